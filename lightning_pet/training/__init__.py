"""What happens around a model in a Trainer: controller, checkpoints, resume."""
