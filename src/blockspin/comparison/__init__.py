"""Every method on the same model and samples."""
