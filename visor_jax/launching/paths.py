"""Files that a configuration names, for machines that get the configuration and not the files.

Tokenizer and records are not copied: they must lie where the machines see them, in a mounted bucket or shared disk.
"""

from __future__ import annotations

import os
from pathlib import PurePosixPath

from visor_jax.config import Config
from visor_jax.config.data_fields import BUILT_IN
from visor_jax.config.mixture import GENERATED, generated_parts
from visor_jax.errors import RequestError
from visor_jax.launching.description import MOUNTS, Launch

SHARED = ("slurm",)  # targets whose jobs run in the folder that they were submitted from


def check_paths(launch: Launch, config: Config) -> None:
    """Checks that the machines can have the files that a configuration names.

    Raises:
      RequestError: a path is relative to the current folder, which the machines do not have, or lies in a bucket that
        they do not mount; names the field.
    """
    for field, path in named_files(config):
        if not os.path.isabs(path) and launch.target not in SHARED:
            raise RequestError(
                f"--config.{field}={path}: is relative to this folder, and does not travel to the machines; expected a"
                f" path that they have, such as --config.{field}={MOUNTS}/BUCKET/{PurePosixPath(path).name} with"
                " --bucket=BUCKET"
            )
        parts = PurePosixPath(path).parts
        if parts[:2] == PurePosixPath(MOUNTS).parts and launch.target not in SHARED:
            bucket = parts[2] if len(parts) > 2 else ""
            if bucket not in launch.buckets:
                raise RequestError(f"--config.{field}={path}: not mounted; expected --bucket={bucket or 'BUCKET'}")


def named_files(config: Config) -> list[tuple[str, str]]:
    """Returns (field, path) of the files and folders outside the workdir that a run reads."""
    found = []
    if config.tokenizer.path not in BUILT_IN:
        found.append(("tokenizer.path", config.tokenizer.path))
    data = config.data
    stored = data.path and data.source not in GENERATED  # of generated data the path names an exercise
    if stored or data.mixture or len(generated_parts(vars(data))) < len(data.parts):
        found.append(("data.root", config.data.root or "."))
    if config.data.mixture and os.path.isfile(config.data.mixture):  # not below data.root, but here
        found.append(("data.mixture", config.data.mixture))
    return found
