"""Training: the loop, stages, optimiser, checkpoints that prove themselves, metrics, and what faults do to a run."""
