"""What scattered blocks cost."""
