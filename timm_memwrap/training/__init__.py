"""Training: recipes, data pipelines, the loop and its checkpoints."""
