"""The TFDS data set `visor_jax_data`: any source of visor_jax, stored as ArrayRecord; importing this registers it."""

from visor_jax_data.visor_jax_data_dataset_builder import Builder, VisorDataConfig

__all__ = ["Builder", "VisorDataConfig"]
