"""One file per engine of Lightning, and what they share."""
