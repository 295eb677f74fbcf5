"""The table of analyses: `--only` names them. Adding one is one file and one line here."""

from __future__ import annotations

from collections.abc import Sequence

from visor_jax.analysis import attention, budgets, cka, contribution, costs, lengths, routes, vision_drop
from visor_jax.analysis.base import LayerAnalysis, RunAnalysis
from visor_jax.errors import RequestError, nearest

LAYER_ANALYSES: tuple[LayerAnalysis, ...] = (
    attention.ANALYSIS,
    cka.ANALYSIS,
    vision_drop.ANALYSIS,
    contribution.ANALYSIS,
)
RUN_ANALYSES: tuple[RunAnalysis, ...] = (budgets.ANALYSIS, routes.ANALYSIS, costs.ANALYSIS, lengths.ANALYSIS)


def chosen(only: Sequence[str], known: Sequence[LayerAnalysis | RunAnalysis]) -> list[LayerAnalysis | RunAnalysis]:
    """Returns the analyses with these names, in the order of the table; all for no name.

    Raises:
      RequestError: a name is not among the `known` ones.
    """
    names = [analysis.name for analysis in known]
    for name in only:
        if name not in names:
            hint = nearest(name, names) or f"expected some of {', '.join(names)}"
            raise RequestError(f"--only={name}: {hint}")
    return [analysis for analysis in known if not only or analysis.name in only]
