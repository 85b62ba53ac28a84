"""Trains a shortened model with the original as its teacher."""
