"""``vllm-pd doctor``: one real handoff between two engines, looked at stage by stage."""
