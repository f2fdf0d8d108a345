"""The public verbs: apply, save, load, merge, and the handle on an adapted model."""
