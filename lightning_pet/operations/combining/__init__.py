"""Arithmetic on delta files, without the model."""
