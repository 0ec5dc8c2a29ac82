"""Training: recipes, the loop with its loss and optimizer, and the checkpoints of trained models."""
