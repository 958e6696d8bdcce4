"""One OpenAI endpoint over pools of prefill and decode engines; see ``docs/frontend.md``."""
