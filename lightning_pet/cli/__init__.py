"""The command: one file per group of verbs."""
