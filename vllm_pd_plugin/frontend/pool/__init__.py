"""Which engines there are, and what is known of each."""
