"""How a prefix gets into an attention."""
