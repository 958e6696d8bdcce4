"""What memory the connector adds, and whether it grows."""
