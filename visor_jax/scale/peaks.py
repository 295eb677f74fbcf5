"""Peak bfloat16 FLOP/s of accelerators by JAX's `device_kind`, as the vendors publish them (dense, not sparse)."""

from __future__ import annotations

import re

# (pattern at the start of `device_kind`, FLOP/s of one JAX device); a chip of TPU7x is two devices
_PEAKS = (
    (r"TPU v4", 275e12),
    (r"TPU (v5 lite|v5e)", 197e12),
    (r"TPU v5", 459e12),
    (r"TPU (v6 lite|v6e)", 918e12),
    (r"TPU ?7x", 2307e12 / 2),
    (r"NVIDIA (H100 PCIe)", 756e12),
    (r"NVIDIA (H100|H200|GH200)", 989e12),
    (r"NVIDIA A100", 312e12),
    (r"NVIDIA L4\b", 121e12),
    (r"NVIDIA L40S", 362e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Returns the peak FLOP/s of one device; None for a kind that is not in the table, such as a CPU."""
    return next((peak for pattern, peak in _PEAKS if re.match(pattern, device_kind)), None)
