"""Golden shardings: where every parameter of the shipped configurations lies, on the topologies they are meant for.

    python -m visor_jax.testing.golden

rewrites `visor_jax/scale/golden/CONFIG-TOPOLOGY-MESH.json`; a test compares them, so that a change to the table in
`visor_jax/scale/sharding.py` or to a model shows in a review as a change of these files. No device is needed. Moments
of the optimizer lie where their parameters do; the bytes per device include them, of the stage `full`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh

import visor_jax.scale
from visor_jax.architecture import MESH_AXES
from visor_jax.config import Config, architecture, load_config, stage_config
from visor_jax.scale.sharding import batch_sharding
from visor_jax.train.guards import sharding_of
from visor_jax.train.optimizer import build_optimizer
from visor_jax.train.state import abstract_state, state_places

FOLDER = Path(visor_jax.scale.__file__).parent / "golden"
STAGE = "full"


@dataclass(frozen=True)
class Case:
    """A configuration on a mesh: sizes within a slice, and slices that hold a replica each."""

    config: str
    topology: str
    fsdp: int
    tensor: int = 1
    slices: int = 1

    @property
    def name(self) -> str:
        sizes = f"fsdp{self.fsdp}" + (f"_tensor{self.tensor}" if self.tensor > 1 else "")
        slices = f"{self.slices}x" if self.slices > 1 else ""
        return f"{self.config}-{slices}{self.topology.replace(':', '_')}-{sizes}"


CASES = (
    Case("llava_ov_0p5b", "v5e:4x4", fsdp=16),
    Case("llava_ov_0p5b", "v5e:4x4", fsdp=16, slices=2),
    Case("llava_ov_1p5b", "v6e:4x4", fsdp=16),
    Case("llava_ov_1p5b", "v6e:4x4", fsdp=4, tensor=4),
    Case("llava_ov_7b", "v5p:4x4x4", fsdp=64),
    Case("llava_ov_7b", "v5p:4x4x4", fsdp=16, tensor=4),
    Case("llava_ov_7b", "v5p:4x4x4", fsdp=64, slices=4),
)


def shardings(case: Case, config: Config) -> dict[str, Any]:
    """Returns the shardings of a case as JSON values; `config` is that of its file, or one of the same model."""
    mesh = AbstractMesh((case.slices, case.fsdp, case.tensor), MESH_AXES)
    settings = stage_config(config, STAGE)
    state = abstract_state(architecture(config, STAGE), settings, build_optimizer(settings))
    places = state_places(state, mesh)
    held = sharding_of(state, places, mesh)
    params = {**state.trainable, **state.frozen}
    specs = {**places.trainable, **places.frozen}
    return {
        "topology": case.topology,
        "mesh": dict(mesh.shape),
        "rows": _plain(batch_sharding(mesh).spec),
        "bytes": held.total,
        "bytes_per_device": held.per_device,
        "params": {path: [list(params[path].shape), _plain(specs[path].spec)] for path in sorted(params)},
    }


def _plain(spec: jax.sharding.PartitionSpec) -> list[Any]:
    return [list(axes) if isinstance(axes, tuple) else axes for axes in spec]


def as_text(found: Mapping[str, Any]) -> str:
    """Returns a file's text: one line for each parameter."""
    lines = ",\n".join(f"  {json.dumps(path)}: {json.dumps(place)}" for path, place in found["params"].items())
    head = "".join(f" {json.dumps(name)}: {json.dumps(value)},\n" for name, value in found.items() if name != "params")
    return f'{{\n{head} "params": {{\n{lines}\n }}\n}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m visor_jax.testing.golden", description="Rewrites the golden shardings."
    )
    parser.add_argument("--configs", type=Path, default=Path("configs"), help="folder of the configuration files")
    configs = parser.parse_args().configs
    FOLDER.mkdir(exist_ok=True)
    for case in CASES:
        file = FOLDER / f"{case.name}.json"
        file.write_text(as_text(shardings(case, load_config(configs / f"{case.config}.py"))), encoding="utf-8")
        print(file)


if __name__ == "__main__":
    main()
