"""A consumer's fetches, and what a worker rank tells of its forward pass."""
