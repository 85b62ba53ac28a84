"""Closed-form repair after a removal: new weights for the out-projections of the kept blocks."""
