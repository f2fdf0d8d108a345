"""Deltas in a model: hosts, from preparation to commit, and what acts in a call."""
