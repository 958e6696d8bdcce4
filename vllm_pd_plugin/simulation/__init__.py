"""Engines without models and processes, on simulated time, links and memory."""
