"""Meshes and shardings: everything about where arrays live, and nothing about what is computed."""
