"""How fast the native ops are."""
