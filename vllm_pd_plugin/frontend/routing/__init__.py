"""Which engines work on a request; pure."""
