"""Arithmetic on deltas: on files without the model, and on those of a model, where the base is at hand."""
