"""Several deltas that train in one run, each on rows of its own."""
