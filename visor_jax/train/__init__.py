"""Training: the loop, the stages and their objectives, the optimizer, metrics, and steps that are not finite."""
