"""visor_jax: vision-language models that decide for each sample how many layers process the visual tokens.

    import visor_jax
    model = visor_jax.load("runs/almanac_mini")
    print(model.answer(image, "What is below Iron?"))

These names are imported when first used, so that the entry point can handle signals before slow imports. `load` and
`Visor` import JAX; `Plan` and `Budget` do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visor_jax.budget import Budget, Plan
    from visor_jax.loading import Visor, load

__version__ = "0.1.0"
__all__ = ["Budget", "Plan", "Visor", "load"]


def __getattr__(name: str) -> Any:
    if name in ("Visor", "load"):
        from visor_jax import loading

        return getattr(loading, name)
    if name in ("Budget", "Plan"):
        from visor_jax import budget

        return getattr(budget, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
