"""Meshes, shardings and compiler options."""
