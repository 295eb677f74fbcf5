"""Whether a configuration fits, within seconds; plans of several slices by formula."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from visor_jax.config import load_config
from visor_jax.errors import RequestError
from visor_jax.planning.fits import fit_by_formula
from visor_jax.planning.plan import plan
from visor_jax.planning.search import search
from visor_jax.planning.workload import mesh_of
from visor_jax.scale.topologies import parse_topology

CONFIGS = Path(__file__).parents[2] / "configs"
TWICE = "--config.data.batch_size=64"


@pytest.mark.parametrize(
    ("name", "topology", "fits"),
    [
        ("llava_ov_0p5b", "v5e:4x4", True),
        ("llava_ov_0p5b", "v5e:2x2", False),
        ("llava_ov_7b", "v5p:4x4x4", True),
        ("llava_ov_7b", "v5e:8x8", False),
        ("llava_ov_7b", "h100x8:8", True),
    ],
)
def test_what_fits_by_formula(name: str, topology: str, fits: bool) -> None:
    fit = fit_by_formula(load_config(CONFIGS / f"{name}.py"), parse_topology(topology))
    assert fit.fits is fits is (fit.bytes_per_chip <= fit.bytes_available)
    assert str(fit).startswith(f"stage 'full' {'fits' if fits else 'does not fit'}: ") and "\n" not in str(fit)


def test_the_answer_needs_neither_jax_nor_libtpu() -> None:
    program = (
        "import sys; from visor_jax.planning.fits import fit_by_formula; from visor_jax.config import load_config;"
        "from visor_jax.scale.topologies import parse_topology;"
        f"fit_by_formula(load_config({str(CONFIGS / 'llava_ov_7b.py')!r}), parse_topology('v5p:4x4x4'));"
        "sys.exit('jax' in sys.modules or 'libtpu' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(
    ("overrides", "axes"),
    [
        (["--config.mesh.dcn_replica=2", TWICE], {"replica": 2, "fsdp": 16, "dcn_replica": 2, "dcn_fsdp": 1}),
        (["--config.mesh.dcn_fsdp=-1", TWICE], {"replica": 1, "fsdp": 32, "dcn_replica": 1, "dcn_fsdp": 2}),
    ],
)
def test_slices_are_joined_by_the_network(overrides: list[str], axes: dict[str, int]) -> None:
    config, topology = load_config(CONFIGS / "llava_ov_0p5b.py", overrides), parse_topology("v5e:4x4", 2)
    result = plan(config, topology, ["full"], seconds=0)
    assert result["chips"] == 32 and result["topology"] == "2 x v5e:4x4"
    assert result["mesh"] == {"tensor": 1, **axes}
    alone = plan(load_config(CONFIGS / "llava_ov_0p5b.py"), parse_topology("v5e:4x4"), ["full"], seconds=0)
    assert result["seconds_per_step"] > alone["seconds_per_step"]
    assert result["flops_per_step"] == pytest.approx(2 * alone["flops_per_step"])


@pytest.mark.parametrize(
    ("slices", "overrides", "expected"),
    [
        (2, [TWICE], r"mesh.dcn_replica=1, mesh.dcn_fsdp=1: .* slices of --topology=v5e:4x4 --slices=2, 2"),
        (1, ["--config.mesh.dcn_replica=2"], r"mesh.dcn_replica=2, .* slices of --topology=v5e:4x4, 1"),
        (2, ["--config.mesh.dcn_replica=2", "--config.mesh.fsdp=8", TWICE], r"mesh.fsdp=8, .* devices of a slice"),
    ],
)
def test_a_mesh_of_other_slices_is_refused(slices: int, overrides: list[str], expected: str) -> None:
    with pytest.raises(RequestError, match=expected):
        mesh_of(load_config(CONFIGS / "llava_ov_0p5b.py", overrides), parse_topology("v5e:4x4", slices))


def test_hosts_of_gpus_count_as_slices_if_the_configuration_says_so() -> None:
    config = load_config(CONFIGS / "llava_ov_0p5b.py", ["--config.mesh.dcn_replica=2"])
    assert mesh_of(config, parse_topology("h100x8:2")).sizes["replica"] == 2


@pytest.mark.parametrize(("topology", "slices"), [("v5e:4x4", 0), ("v5e:4x4", 257), ("h100x8", 2)])
def test_a_wrong_number_of_slices_is_refused(topology: str, slices: int) -> None:
    with pytest.raises(RequestError, match=rf"^--slices={slices}: expected 1 to 256|h100x8:2"):
        parse_topology(topology, slices)


def test_a_search_over_slices_chooses_an_axis_for_them() -> None:
    config = load_config(CONFIGS / "llava_ov_0p5b.py", [TWICE])
    best = search(config, parse_topology("v5e:4x4", 2), ["full"])[0]
    chosen = best.config.mesh
    assert {chosen.dcn_replica, chosen.dcn_fsdp} == {1, 2} and mesh_of(best.config, parse_topology("v5e:4x4", 2))
