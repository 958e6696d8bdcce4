"""What lossy codecs do to a real model."""
