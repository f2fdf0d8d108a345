"""One Lightning callback per method."""
