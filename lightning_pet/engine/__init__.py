"""Lightning glue: controller, optimizer groups, checkpoints, strategies."""
