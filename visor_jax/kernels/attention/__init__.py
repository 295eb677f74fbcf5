"""Attention by position and segment: `base` holds contract and reference, `api` chooses among implementations."""

from visor_jax.kernels.attention.api import attention
from visor_jax.kernels.attention.base import AttentionMask

__all__ = ["AttentionMask", "attention"]
