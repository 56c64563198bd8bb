"""Derivatives by rules of our own, for functions that are no solve in particular."""
