"""The Dockerfiles of the images in which a run starts, one for each kind of accelerator.

They are built from a checkout of the repository, whose `launch/docker/` holds them and the versions of all packages.
"""

from __future__ import annotations

from collections.abc import Mapping

from visor_jax.launching.template import render

# Kind -> what it is called, and what gives a container the accelerators of its machine.
KINDS: Mapping[str, tuple[str, str]] = {
    "tpu": ("TPUs", "--privileged --network=host"),
    "cuda": ("NVIDIA GPUs", "--gpus=all"),
}


def dockerfile(kind: str) -> str:
    """Returns `launch/docker/KIND.Dockerfile`."""
    what, options = KINDS[kind]
    return render("Dockerfile", kind=kind, what=what, options=options)
