"""Engines of two of vLLM's release lines in one pool; run by `make test-minors`."""
