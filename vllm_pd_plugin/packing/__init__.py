"""Pieces of KV that a producer writes down and a consumer reads as one."""
