"""The memory planner: what a run needs, by rank, batch and method."""
