"""Checkpoints of a stage: saving steps, their manifests, and reading them back onto any mesh."""
