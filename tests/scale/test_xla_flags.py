"""XLA's flags by chip: what is added to an environment, and how the chip of a host is recognized."""

from __future__ import annotations

from pathlib import Path

import pytest

from visor_jax.scale.topologies import CHIPS
from visor_jax.scale.xla_flags import FLAGS, GPU, TPU, chip_of_host, set_flags


def test_every_chip_has_flags_of_its_kind() -> None:
    assert FLAGS.keys() == CHIPS.keys()
    for name, (variable, flags) in FLAGS.items():
        assert variable == {"tpu": TPU, "gpu": GPU}[CHIPS[name].kind]
        names = [flag.partition("=")[0] for flag in flags]
        assert len(names) == len(set(names)) and all(name.startswith("--xla_") for name in names)


@pytest.mark.parametrize("chip", FLAGS)
def test_what_the_user_has_set_is_kept(chip: str) -> None:
    variable, flags = FLAGS[chip]
    name = flags[0].partition("=")[0]
    environment = {variable: f"{name}=mine --xla_other=1"}
    set_flags(environment, chip)
    assert environment[variable].startswith(f"{name}=mine --xla_other=1")
    assert environment[variable].count(f"{name}=") == 1
    for flag in flags[1:]:
        assert flag in environment[variable].split(" ")


def test_variables_of_hopper_are_defaults() -> None:
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    set_flags(environment, "h100")
    assert environment["CUDA_DEVICE_MAX_CONNECTIONS"] == "8" and environment["JAX_OPTIMIZATION_LEVEL"] == "O1"


def test_they_can_be_switched_off_and_unknown_chips_have_none() -> None:
    environment = {"VISOR_XLA_FLAGS": "0"}
    set_flags(environment, "v5e")
    assert environment == {"VISOR_XLA_FLAGS": "0"}
    set_flags(empty := {}, "")
    assert empty == {}


@pytest.mark.parametrize(
    ("vendor", "device", "chip"),
    [
        ("0x1ae0", "0x0063", "v5e"),
        ("0x1ae0", "0x0062", "v5p"),
        ("0x1ae0", "0x0076", "tpu7x"),
        ("0x1ae0", "0x9999", ""),
        ("0x8086", "0x0063", ""),
    ],
)
def test_a_tpu_host_is_recognized_by_its_devices(tmp_path: Path, vendor: str, device: str, chip: str) -> None:
    folder = tmp_path / "0000:00:04.0"
    folder.mkdir()
    (folder / "vendor").write_text(f"{vendor}\n")
    (folder / "device").write_text(f"{device}\n")
    assert chip_of_host(pci=tmp_path, nvidia=tmp_path / "none") == chip


def test_a_gpu_host_is_recognized_by_its_driver(tmp_path: Path) -> None:
    folder = tmp_path / "0000:18:00.0"
    folder.mkdir()
    (folder / "information").write_text("Model: \t NVIDIA H200\nIRQ: 18\n")
    assert chip_of_host(pci=tmp_path / "none", nvidia=tmp_path) == "h200"
