"""Decoders, one file for each kind."""
