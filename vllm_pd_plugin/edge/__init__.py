"""All that imports vLLM in an engine."""
