"""Several deltas trained in one run: rows to tasks, steps, figures and files of each."""
