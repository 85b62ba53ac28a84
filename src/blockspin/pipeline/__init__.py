"""The whole method: its plan, its stages, what is refused before they start, and the page of a run."""
