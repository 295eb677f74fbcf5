"""Peak bfloat16 FLOP/s of accelerators by JAX's `device_kind`.

Figures are those that the vendors publish, without sparsity.
"""

from __future__ import annotations

import re

from visor_jax.scale.topologies import CHIPS

_CHIPS = (  # (pattern at the start of `device_kind`, chip)
    (r"TPU v4", "v4"),
    (r"TPU (v5 lite|v5e)", "v5e"),
    (r"TPU v5", "v5p"),
    (r"TPU (v6 lite|v6e)", "v6e"),
    (r"TPU ?7x", "tpu7x"),
    (r"NVIDIA H100(?! PCIe)", "h100"),
    (r"NVIDIA (GH200|H200)", "h200"),
)
_OTHERS = ((r"NVIDIA H100 PCIe", 756e12), (r"NVIDIA A100", 312e12), (r"NVIDIA L40S", 362e12), (r"NVIDIA L4\b", 121e12))


def peak_flops(device_kind: str) -> float | None:
    """Returns the peak FLOP/s of one JAX device; None for a kind that is not in the tables, such as a CPU."""
    for pattern, name in _CHIPS:
        if re.match(pattern, device_kind):
            return CHIPS[name].flops / CHIPS[name].cores
    return next((peak for pattern, peak in _OTHERS if re.match(pattern, device_kind)), None)
