"""Thousands of deltas in a folder, a few of them in memory, in slots of one model."""
