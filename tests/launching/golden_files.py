"""Golden files: every command line, script and manifest that `visor launch` makes of some descriptions.

    python -m tests.launching.golden_files

rewrites `tests/launching/golden/CASE.ACTION.sh`, each of which is what `--dry-run` prints, with stderr as comments. A
change of a flag, a default or a manifest then shows in a review as a change of these files. The resolved configuration
is replaced by a short one, and paths of this machine by fixed ones.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from pathlib import Path
from typing import Any

import visor_jax.errors
from visor_jax.launching import wheel
from visor_jax.launching.description import describe
from visor_jax.launching.steps import Runner

FOLDER = Path(__file__).parent / "golden"
ROOT = Path(visor_jax.errors.__file__).parents[1]
ACTIONS = ("up", "logs", "status", "stop", "resume", "delete")
COMMON: dict[str, Any] = {
    "name": "first", "config": "llava_ov_0p5b", "config_json": '{"resolved": "configuration"}\n',
    "workdir": "gs://runs-1/first",
}  # fmt: skip
GOOGLE: dict[str, Any] = {
    "zone": "us-west4-a",
    "project": "my-project",
    "secrets": ("HF_TOKEN",),
    "buckets": ("data-1",),
}
IMAGE = "us-docker.pkg.dev/my-project/visor/visor:1"
TPU = {**COMMON, **GOOGLE, "target": "tpu", "topology": "v5e:4x4"}
GKE = {**COMMON, **GOOGLE, "target": "gke", "topology": "v5e:4x4", "image": IMAGE, "cluster": "c1", "queue": "q1"}
SLURM = {**COMMON, "target": "slurm", "topology": "h100x8:2", "workdir": "/shared/first", "queue": "gpu"}
SKY = {**COMMON, **GOOGLE, "target": "sky", "topology": "v5e:4x4"}
OWN = {"config": "configs/forkme.py", "overrides": ("--config.train.steps=9",)}
ACCOUNT = "trainer@my-project.iam.gserviceaccount.com"

# Name -> description; the first of each target shows every action, the others `up`.
CASES: dict[str, dict[str, Any]] = {
    "tpu-v5e": TPU,
    "tpu-v5p-spot": {
        **TPU, "topology": "v5p:2x2x4", "zone": "us-east5-a", "capacity": "spot", "service_account": ACCOUNT,
        "labels": ("team=vision",),
    },
    "tpu-v6e-two-slices": {**TPU, "topology": "v6e:4x4", "slices": 2, "zone": "us-east5-b", "capacity": "reserved"},
    "tpu-v4-flex-start": {
        **TPU, "topology": "v4:2x2x1", "zone": "us-central2-b", "capacity": "flex-start", "workdir": "/mnt/runs/first",
        "secrets": (), "buckets": (), "project": "",
    },
    "gke-v5e": GKE,
    "gke-v5p-by-xpk-too": {
        **GKE, "topology": "v5p:2x2x4", "zone": "us-east5-a", "capacity": "spot", "secrets": (), "buckets": (),
        "queue": "",
    },
    "gke-tpu7x-own-config": {
        **GKE, **OWN, "topology": "tpu7x:2x2x2", "zone": "us-central1-c", "capacity": "flex-start",
    },
    "gke-v6e-two-slices": {**GKE, "topology": "v6e:4x4", "slices": 2, "zone": "us-east5-b", "capacity": "spot"},
    "gke-h100": {**GKE, "topology": "h100x8:2", "zone": "us-central1-a", "overrides": OWN["overrides"]},
    "slurm-h100": SLURM,
    "slurm-own-config": {**SLURM, **OWN, "topology": "h100x8", "secrets": ("HF_TOKEN",)},
    "sky-v5e": SKY,
    "sky-v6e-spot": {**SKY, **OWN, "topology": "v6e:2x4", "zone": "us-east5-b", "capacity": "spot"},
    "sky-h100": {**SKY, "topology": "h100x8:2", "zone": "", "overrides": OWN["overrides"]},
}  # fmt: skip


def files() -> dict[str, tuple[str, str]]:
    """Returns file name -> case and action."""
    found: dict[str, tuple[str, str]] = {}
    for case, fields in CASES.items():
        first = next(name for name, other in CASES.items() if other["target"] == fields["target"]) == case
        found |= {f"{case}.{action}.sh": (case, action) for action in (ACTIONS if first else ("up",))}
    return found


def text_of(case: str, action: str) -> str:
    """Returns what a dry run of this action prints."""
    launch = describe(**CASES[case])
    target = importlib.import_module(f"visor_jax.launching.{launch.target}")
    target.check(launch)
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()) as said:
        target.ACTIONS[action](launch, Runner(launch.name, dry_run=True))
    progress = "".join(f"\n# on stderr: {line}" for line in said.getvalue().splitlines())
    text = (printed.getvalue() + progress).rstrip("\n") + "\n"
    text = text.replace(sys.executable, "python").replace(f"{ROOT}\n", "/repository\n")
    text = text.replace(wheel.FILE, "visor_jax-VERSION-py3-none-any.whl").replace(" ".join(wheel.pins()), "PINS")
    return "#!/bin/bash\n" + text.replace(str(Path.cwd()), "/here")


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, (case, action) in files().items():
        (FOLDER / name).write_text(text_of(case, action), encoding="utf-8")
        print(FOLDER / name)


if __name__ == "__main__":
    main()
