"""The search for an intrinsic dimension."""
