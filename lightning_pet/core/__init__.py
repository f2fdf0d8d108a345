"""Plain torch: finding the places in a model, and putting deltas there."""
