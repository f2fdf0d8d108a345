"""One small forward, read as a graph: roles, residual sites, attention."""
