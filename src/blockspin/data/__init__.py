"""Text in, token samples and training windows out."""
