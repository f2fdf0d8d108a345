"""Diff pruning: the callback, the cut, and the curve of its density."""
