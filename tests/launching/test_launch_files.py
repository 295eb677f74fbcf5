"""The manifests and Dockerfiles in `launch/`: what `visor_jax/launching` renders, for the command in each manifest.

`python -m tests.launching.test_launch_files` writes them again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from visor_jax.launching import gke, images, sky
from visor_jax.launching.description import Launch, describe

ROOT = Path(__file__).parents[2]
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
    header = (
        f"# visor launch --dry-run --target={target} --name=first --topology={topology} \\\n"
        f"#   --config={given['config']} --workdir={given['workdir']}" + (" \\\n" if words else "\n")
    )
    header += f"#   {' '.join(words)}\n" if words else ""
    return header + render(describe(target, "first", topology, config_json="{}", **given))


def rendered() -> dict[str, str]:
    """Returns every file by its path in the repository."""
    dockerfiles = {f"launch/docker/{kind}.Dockerfile": images.dockerfile(kind) for kind in images.KINDS}
    return {name: content(name) for name in FILES} | dockerfiles


@pytest.mark.parametrize("name", rendered())
def test_a_file_is_what_is_rendered(name: str) -> None:
    assert (ROOT / name).read_text() == rendered()[name]


def test_every_manifest_is_rendered() -> None:
    folder = ROOT / "launch"
    found = [*(folder / "gke").iterdir(), *folder.glob("*.yaml"), *(folder / "docker").glob("*Dockerfile*")]
    assert {str(path.relative_to(ROOT)) for path in found} == set(rendered())


if __name__ == "__main__":
    for file, text in rendered().items():
        (ROOT / file).write_text(text)
