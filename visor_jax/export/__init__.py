"""Exports: a trained model as a Hugging Face folder with its own PyTorch module, and the proof that both agree."""
