"""Serving an artifact: the packed cache, attention over it, and attaching both to a model."""
