"""XLA's flags for each kind of chip, set in the environment before JAX starts.

In: the environment of a process, and the chip of its host. Out: the variables that libtpu and XLA read when they start.
Whatever the user has set is kept: a flag that is already there is not added. The sets are those of published runs
(MaxText, JAX-Toolbox); `tests/planning/test_compiled.py` checks that libtpu and jaxlib know every name. No JAX import.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path

TPU, GPU = "LIBTPU_INIT_ARGS", "XLA_FLAGS"

_OVERLAP_REPLICAS = (
    "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
    "--xla_tpu_data_parallel_opt_different_sized_ops=true",
)
_FUSE_GATHERS = (
    "--xla_tpu_enable_async_collective_fusion=true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
    "--xla_tpu_overlap_compute_collective_tc=true",
    "--xla_enable_async_all_gather=true",
)
# Gathers of FSDP stay gathers. As products in windows, with a permute for each, a chip sends 18.5 GB per step of 0.5B
# on v5e:4x4 instead of 10.6 (compiled; docs/plan.md). v5p's program has no windows; on v6e their estimate is better.
_WHOLE_GATHERS = ("--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000",)
_V5P = (
    "--xla_tpu_megacore_fusion_allow_ags=false",
    "--xla_enable_async_collective_permute=true",
    "--xla_tpu_enable_ag_backward_pipelining=true",
    "--xla_sc_disable_megacore_partitioning=true",
    "--xla_tpu_use_tc_device_shape_on_sc=true",
    "--xla_tpu_enable_sparse_core_collective_offload_all_gather=true",
)
_V6E = (
    "--xla_tpu_scoped_vmem_limit_kib=98304",
    "--xla_tpu_use_minor_sharding_for_major_trivial_input=true",
    "--xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1",
    "--xla_tpu_assign_all_reduce_scatter_layout=true",
)
_TPU7X = (
    "--xla_tpu_scoped_vmem_limit_kib=61440",
    "--xla_tpu_bf16_emission_mode=NATIVE_EMISSION",
    "--xla_tpu_enable_sparse_core_collective_offload_all_reduce=true",
)
_HOPPER = (
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    "--xla_gpu_enable_command_buffer=",
    "--xla_gpu_all_gather_combine_threshold_bytes=1073741824",
    "--xla_gpu_reduce_scatter_combine_threshold_bytes=1073741824",
    "--xla_gpu_all_reduce_combine_threshold_bytes=134217728",
    "--xla_gpu_enable_pipelined_all_gather=true",
    "--xla_gpu_enable_pipelined_reduce_scatter=true",
    "--xla_gpu_enable_pipelined_all_reduce=true",
    "--xla_gpu_enable_while_loop_double_buffering=true",
)

FLAGS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "v4": (TPU, (*_OVERLAP_REPLICAS, *_FUSE_GATHERS)),
    "v5e": (TPU, (*_OVERLAP_REPLICAS, *_FUSE_GATHERS, *_WHOLE_GATHERS)),
    "v5p": (TPU, (*_OVERLAP_REPLICAS, *_FUSE_GATHERS, *_V5P)),
    "v6e": (TPU, (*_OVERLAP_REPLICAS, *_FUSE_GATHERS, *_V6E)),
    "tpu7x": (TPU, _TPU7X),
    "h100": (GPU, _HOPPER),
    "h200": (GPU, _HOPPER),
}
VARIABLES: Mapping[str, Mapping[str, str]] = {
    name: {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "JAX_OPTIMIZATION_LEVEL": "O1"} for name in ("h100", "h200")
}
OFF = "VISOR_XLA_FLAGS"  # set to 0: no flag is added

PCI, NVIDIA = Path("/sys/bus/pci/devices"), Path("/proc/driver/nvidia/gpus")
GOOGLE = "0x1ae0"
PCI_CHIPS = {"0x005e": "v4", "0x0062": "v5p", "0x0063": "v5e", "0x006f": "v6e", "0x0076": "tpu7x"}


def set_flags(environment: MutableMapping[str, str], chip: str) -> None:
    """Adds the flags of `chip` to the environment; flags and variables that it already has are kept."""
    if environment.get(OFF) == "0" or chip not in FLAGS:
        return
    variable, flags = FLAGS[chip]
    given = environment.get(variable, "")
    names = set(re.findall(r"--([\w.]+)", given))
    added = [flag for flag in flags if flag.removeprefix("--").partition("=")[0] not in names]
    environment[variable] = " ".join([*([given] if given else []), *added])
    for name, value in VARIABLES.get(chip, {}).items():
        environment.setdefault(name, value)


def chip_of_host(pci: Path = PCI, nvidia: Path = NVIDIA) -> str:
    """Returns the kind of the chips that this machine has, from its PCI devices or its NVIDIA driver; "" for others."""
    for vendor in sorted(pci.glob("*/vendor")):
        if _read(vendor) == GOOGLE and (chip := PCI_CHIPS.get(_read(vendor.with_name("device")))):
            return chip
    for information in sorted(nvidia.glob("*/information")):
        if match := re.search(r"\b(H100|H200)\b", _read(information)):
            return match[1].lower()
    return ""


def set_flags_of_host() -> None:
    """Adds the flags of this machine's chips to the environment, unless it computes on the CPU."""
    if os.environ.get("JAX_PLATFORMS", "") != "cpu":
        set_flags(os.environ, chip_of_host())


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
