"""vLLM's own tests of its servers, run on `vllm serve` and on `vllm-pd up`.

Nothing of vLLM's is changed: its tests come from the source distribution of the installed version,
run in a process of their own, and find a program named ``vllm`` first on the PATH. See
docs/conformance.md.
"""
