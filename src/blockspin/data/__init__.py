"""Turns text into token samples and training windows."""
