"""How much XLA may do about a program.

In: parameters. Out: `compiler_options` for `jax.jit`. None leaves XLA at its best. On CPU, programs of a small model
that run only a few times (a random start, answers, an export's proof) take longer to compile than they will ever run:
they are compiled several times faster, into programs that run slower. Those of a large model leave matrix products to
Eigen, which is a tenth faster at them than XLA's own choice.
"""

from __future__ import annotations

from typing import Any

import jax

SMALL = 5_000_000  # parameters
QUICK: dict[str, bool | int | str] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # later ones have no such option
    QUICK["xla_cpu_use_fusion_emitters"] = False
LARGE = {"xla_cpu_experimental_ynn_fusion_type": ""}


def options(params: Any) -> dict[str, bool | int | str] | None:
    """Options for a program over `params` (arrays or their shapes) that is run a few times, as answers are."""
    if jax.default_backend() != "cpu":
        return None
    small = sum(leaf.size for leaf in jax.tree.leaves(params)) <= SMALL
    return dict(QUICK) if small else dict(LARGE)
