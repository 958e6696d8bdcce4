"""What becomes of requests when engines die and links drop."""
