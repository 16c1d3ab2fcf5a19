"""Model files, checkpoints, safe loading and exact resumption."""
