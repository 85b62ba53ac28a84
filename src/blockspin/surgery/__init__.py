"""Takes blocks out of a model in memory and of a checkpoint on disk."""
