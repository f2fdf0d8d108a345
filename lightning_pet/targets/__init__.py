"""From patterns and roles to the places that are meant."""
