"""vLLM's API server over the pool."""
