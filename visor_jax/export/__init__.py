"""Exports a trained model as a Hugging Face folder with a PyTorch module, and verifies that both agree."""
