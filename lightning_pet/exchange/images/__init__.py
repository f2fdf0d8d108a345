"""Deltas of image models, as their trainers write them."""
