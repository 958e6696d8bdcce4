"""One request on its way over the engines."""
