"""Reads and writes files: atomic writes, bounded sizes, validated content."""
