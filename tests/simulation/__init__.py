"""Producers and consumers in a simulated world where everything goes wrong; see ``__main__``."""
