"""The model: NNX modules that declare parameters, and the pure functions that use them. Start at `visor.py`."""
