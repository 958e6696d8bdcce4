"""Which of vLLM's names the package uses, and which of them each release line has.

`python -m tests.vllm_names WHEEL...` reads vLLM's own wheels, of any build, and writes the list of
each one's release line beside this file; nothing of vLLM is imported for it.
"""
