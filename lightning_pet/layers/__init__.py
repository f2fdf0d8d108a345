"""Plain torch modules with the mathematics of the methods."""
