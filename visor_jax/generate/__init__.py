"""How a trained model speaks: shapes from buckets, compiled programs, choice of the next token, text while it comes.

`visor_jax.generate.visor.Visor` is the front of this room; nothing here knows of workdirs or commands.
"""
