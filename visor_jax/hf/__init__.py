"""Folders in Hugging Face's format: reading configurations, weights and preprocessors, from disk or from the hub."""
