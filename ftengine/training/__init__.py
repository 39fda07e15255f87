"""Networks, losses, the two training stages, checkpoints."""
