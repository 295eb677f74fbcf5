"""Cross-entropy over a vocabulary: `base` holds contract and reference, `api` chooses among implementations."""

from visor_jax.kernels.cross_entropy.api import cross_entropy

__all__ = ["cross_entropy"]
