"""What frontends and an engine core say to each other, both ends."""
