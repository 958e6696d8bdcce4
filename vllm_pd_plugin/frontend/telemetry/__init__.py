"""Series and spans."""
