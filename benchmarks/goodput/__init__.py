"""How many requests a second meet an SLO."""
