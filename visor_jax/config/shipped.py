"""The checkpoints that the package contains, by name. No JAX import.

Each is a folder in Hugging Face's format below `visor_jax/assets`. Its name stands where a folder or a model of the hub
may stand (`visor_jax.load`, `visor import --from`), and where a stage starts from (`init_from`).
"""

from __future__ import annotations

from pathlib import Path

from visor_jax.errors import RequestError
from visor_jax.files.read_write import as_path

ASSETS = Path(__file__).parents[1] / "assets"
SHIPPED = ("almanac-base",)


def shipped_folder(name: str) -> Path:
    """Returns the folder of a shipped checkpoint.

    Args:
      name: one of `SHIPPED`.

    Raises:
      RequestError: this installation does not contain it.
    """
    folder = ASSETS / name
    if not (folder / "config.json").is_file():
        raise RequestError(
            f"{name}: {folder} holds no checkpoint; expected an installation with its data files, or"
            " `python -m visor_jax.export.ship` to make them"
        )
    return folder


def checkpoint_folder(init_from: str) -> Path | None:
    """Returns the folder of the checkpoint that an `init_from` names; None if it names a stage or nothing.

    Raises:
      RequestError: as `shipped_folder`.
    """
    if init_from in SHIPPED:
        return shipped_folder(init_from)
    # A stage's folder has no config.json.
    return as_path(init_from) if "/" in init_from and (as_path(init_from) / "config.json").is_file() else None
