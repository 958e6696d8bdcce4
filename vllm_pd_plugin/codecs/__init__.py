"""How KV is written down to be sent, and the ops that do it."""
