"""Sizes of the mesh axes, -1 replaced by what remains: the same rule for devices, slices and plans. No JAX import."""

from __future__ import annotations

import math
from collections.abc import Mapping

from visor_jax.errors import RequestError


def filled(sizes: Mapping[str, int], count: int, of_what: str) -> list[int]:
    """Returns the sizes, -1 replaced by what remains of `count`.

    Raises:
      RequestError: their product is not `count`; the message names the fields of `mesh`.
    """
    known = math.prod(size for size in sizes.values() if size != -1)
    one_open = list(sizes.values()).count(-1) == 1
    shape = [max(count // max(known, 1), 1) if size == -1 and one_open else size for size in sizes.values()]
    if math.prod(shape) != count or min(shape) < 1:
        settings = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
        raise RequestError(f"{settings}: the product must be the number of {of_what}, {count} (one may be -1)")
    return shape
