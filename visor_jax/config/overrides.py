"""What one stage sets for itself of the training settings.

Ground floor: no JAX import.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any


@dataclass(frozen=True)
class TrainOverrides(Mapping[str, Any]):
    """The fields of `TrainConfig` that one stage sets for itself: a mapping, also read as attributes."""

    given: tuple[tuple[str, Any], ...] = ()  # (field, value) pairs, by name

    @classmethod
    def of(cls, **given: Any) -> TrainOverrides:
        return cls(tuple(sorted(given.items())))

    def __getitem__(self, name: str) -> Any:
        return dict(self.given)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict(self.given))

    def __len__(self) -> int:
        return len(self.given)

    if not TYPE_CHECKING:  # a type checker refuses attributes: which ones there are differs from stage to stage

        def __getattr__(self, name: str) -> Any:
            try:
                return dict(object.__getattribute__(self, "given"))[name]
            except KeyError:
                raise AttributeError(f"{name!r} is not overridden") from None
