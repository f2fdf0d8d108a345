"""What a module is, without running it: names, kinds of layers, structure, and the record of what was applied to it."""
