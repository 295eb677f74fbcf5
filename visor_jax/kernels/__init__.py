"""Kernels: functions of arrays that know nothing of models or budgets.

One folder per operation, always the same file names: `base` (contract and plain XLA reference), `api` (which
implementation runs), one file per further implementation. The operations themselves are exported here:
`visor_jax.kernels.attention(...)` is the function, and `from visor_jax.kernels.attention import base` still finds the
folder of the same name, because an import statement goes through `sys.modules` and not through this attribute.
"""

from visor_jax.kernels.attention.api import attention
from visor_jax.kernels.attention.base import AttentionMask
from visor_jax.kernels.cross_entropy.api import cross_entropy

__all__ = ["AttentionMask", "attention", "cross_entropy"]
