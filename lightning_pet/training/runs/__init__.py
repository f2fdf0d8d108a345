"""Several runs in one Trainer, each with the weights of its solo run: what keeps them apart."""
