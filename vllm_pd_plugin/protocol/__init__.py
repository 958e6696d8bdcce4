"""What engines say to each other, and the state of each handoff on both sides."""
