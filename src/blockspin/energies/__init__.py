"""What predicts the loss of a model without some blocks."""
