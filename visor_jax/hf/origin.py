"""Where the weights of a folder in Hugging Face's format come from: base model and license."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from visor_jax.files.read_write import read_regular

MAX_CARD_BYTES = 1 << 20


def origin_of(folder: Path) -> dict[str, str]:
    """Returns `base_model` and `license` of a checkpoint's folder, as far as they are known.

    The model's id comes from its path in the hub's cache (`models--OWNER--NAME/snapshots/...`), or from the metadata of
    its README.md, which also gives the license.
    """
    origin = {}
    repository = next((part for part in folder.absolute().parts if part.startswith("models--")), "")
    if repository:
        origin["base_model"] = "/".join(repository.split("--")[1:])
    metadata = card_metadata(folder / "README.md")
    if isinstance(metadata.get("license"), str):
        origin["license"] = metadata["license"]
    if "base_model" not in origin and isinstance(metadata.get("base_model"), str):
        origin["base_model"] = metadata["base_model"]
    return origin


def card_metadata(path: Path) -> dict[str, Any]:
    """Returns the metadata of a model card; empty if the card is missing or cannot be parsed."""
    from huggingface_hub import ModelCard

    try:
        return ModelCard(read_regular(path, MAX_CARD_BYTES).decode("utf-8")).data.to_dict()
    except Exception:  # a broken card is no reason to reject its model
        return {}
