"""Pairs of unequal engines: do they answer as one of them alone does?"""
