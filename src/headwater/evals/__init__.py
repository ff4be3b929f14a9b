"""Held-out evaluation and the statistics of what it finds."""
