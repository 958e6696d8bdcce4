"""What a frontend costs."""
