"""What lmms-eval's registry of models reads from this package: the entry point of the group `lmms_eval.models`.

In: nothing. Out: a manifest for each `--model` name. lmms-eval imports this file in every run, whatever model it
evaluates, so JAX and PyTorch are only imported with the class that a manifest names.
"""

from __future__ import annotations

from typing import Any

CLASSES = {
    "visor": "visor_jax.evaluate.lmms_eval.VisorJax",
    "visor_torch": "visor_jax.export.lmms_eval.VisorTorch",
}


def manifests() -> list[Any]:
    """Returns the `ModelManifest`s of this package."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return [ModelManifest(model_id=name, simple_class_path=path) for name, path in CLASSES.items()]
