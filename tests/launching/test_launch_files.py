"""The manifests and Dockerfiles in `launch/`: what `visor_jax/launching` renders, for the command in each manifest.

`python -m tests.launching.test_launch_files` writes them again.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from visor_jax.__main__ import main
from visor_jax.launching import gke, images, sky, wheel
from visor_jax.launching.description import Launch, describe

ROOT = Path(__file__).parents[2]
# Where the machines see what the configuration names.
DATA = ("--config.tokenizer.path=/gcs/my-data/tokenizer.json", "--config.data.root=/gcs/my-data/records")
Render = Callable[[Launch], str]
FILES: dict[str, tuple[Render, str, str, dict[str, Any]]] = {
    "launch/gke/v5e-16.yaml": (gke.manifest, "gke", "v5e:4x4", {"secrets": ["HF_TOKEN"]}),
    "launch/gke/v6e-16-two-slices-spot.yaml": (gke.manifest, "gke", "v6e:4x4", {"slices": 2, "capacity": "spot"}),
    "launch/gke/tpu7x-8.yaml": (gke.manifest, "gke", "tpu7x:2x2x2", {}),
    "launch/gke/h100x8.yaml": (gke.manifest, "gke", "h100x8", {}),
    "launch/skypilot.yaml": (sky.task, "sky", "v6e:4x4", {"capacity": "spot", "secrets": ["HF_TOKEN"]}),
}


def content(name: str) -> str:
    """Returns a file of `launch/`: how to make it for another name, project and bucket, and what that renders."""
    render, target, topology, options = FILES[name]
    image = {} if target == "sky" else {"image": "us-docker.pkg.dev/my-project/visor/visor:1"}
    given = {"config": "llava_ov_0p5b", "workdir": "gs://my-bucket/runs/first", **image, **options}
    flags = {"capacity": "--capacity={}", "slices": "--slices={}", "image": "--image={}"}
    words = [flags[key].format(value) for key, value in given.items() if key in flags]
    words += [f"--secret={secret}" for secret in options.get("secrets", ())]
    slices = options.get("slices", 1)
    overrides = [*DATA, *(["--config.mesh.dcn_replica=2", "--config.data.batch_size=64"] if slices > 1 else [])]
    lines = [
        f"visor launch --dry-run --target={target} --name=first --topology={topology}",
        f"--config={given['config']} --workdir={given['workdir']}",
        " ".join(words),
        f"--bucket=my-data {' '.join(DATA)}",
        " ".join(overrides[len(DATA) :]),
    ]
    header = " \\\n#   ".join(line for line in lines if line)
    launch = describe(target, "first", topology, config_json="{}", buckets=["my-data"], overrides=overrides, **given)
    return f"# {header}\n{render(launch)}"


def pinned() -> list[str]:
    """Returns the versions of requirements.txt, which files of the repository name whatever is installed here."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    versions = {name.replace("_", "-"): version for name, _, version in (line.partition("==") for line in lines)}
    return [f"{name}=={versions[name]}" for name in wheel.PINNED]


@pytest.fixture(autouse=True)
def pins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel, "pins", pinned)


def rendered() -> dict[str, str]:
    """Returns every file by its path in the repository."""
    dockerfiles = {f"launch/docker/{kind}.Dockerfile": images.dockerfile(kind) for kind in images.KINDS}
    return {name: content(name) for name in FILES} | dockerfiles


@pytest.mark.parametrize("name", rendered())
def test_a_file_is_what_is_rendered(name: str) -> None:
    assert (ROOT / name).read_text() == rendered()[name]


@pytest.mark.parametrize("name", FILES)
def test_the_command_in_a_file_prints_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As typed: no check refuses it, that of its memory included. The digest counts the resolved configuration too."""
    text = (ROOT / name).read_text()
    lines = [line.removeprefix("#").rstrip("\\") for line in text.splitlines() if line.startswith("#")]
    assert main(shlex.split(" ".join(lines))[1:]) == 0, capsys.readouterr().err
    manifest = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))
    assert without_digest(manifest) in without_digest(capsys.readouterr().out)


def without_digest(text: str) -> str:
    return re.sub(r"(visor-jax/launch:) \S+", r"\1", text)


def test_every_manifest_is_rendered() -> None:
    folder = ROOT / "launch"
    found = [*(folder / "gke").iterdir(), *folder.glob("*.yaml"), *(folder / "docker").glob("*Dockerfile*")]
    assert {str(path.relative_to(ROOT)) for path in found} == set(rendered())


if __name__ == "__main__":
    wheel.pins = pinned
    for file, text in rendered().items():
        (ROOT / file).write_text(text)
