"""Training: the loop, stages, optimizer, checkpoints that prove themselves, metrics, and what faults do to a run."""
