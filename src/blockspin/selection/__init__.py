"""Chooses a removal by measuring."""
