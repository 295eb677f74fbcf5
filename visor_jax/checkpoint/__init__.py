"""Saves checkpoints with manifests, and restores them onto any mesh."""
