"""Closed-form repair after a removal: new weights for linear maps of the kept blocks."""
