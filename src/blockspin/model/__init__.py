"""The model to shorten: opening it, its blocks, passes without some of them, what they do to its predictions."""
