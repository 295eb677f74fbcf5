"""Answers questions with a trained model: shape buckets, compiled programs, sampling, streaming.

`visor_jax.generate.visor.Visor` is the interface; nothing here depends on workdirs or commands.
"""
