"""What an idle engine costs."""
