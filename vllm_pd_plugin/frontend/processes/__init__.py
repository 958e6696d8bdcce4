"""Processes that are kept up."""
