"""A model of the mapping by brute force, and pairs of engines to try it on.

python -m tests.mapping --examples 20000
"""
