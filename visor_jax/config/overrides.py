"""The training settings that one stage overrides. No JAX import."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any


@dataclass(frozen=True)
class TrainOverrides(Mapping[str, Any]):
    """The fields of `TrainConfig` that one stage overrides: a mapping whose keys are also attributes."""

    fields: tuple[tuple[str, Any], ...] = ()  # (field, value) pairs, sorted by name

    @classmethod
    def of(cls, **fields: Any) -> TrainOverrides:
        return cls(tuple(sorted(fields.items())))

    def __getitem__(self, name: str) -> Any:
        return dict(self.fields)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict(self.fields))

    def __len__(self) -> int:
        return len(self.fields)

    if not TYPE_CHECKING:  # attributes differ from stage to stage, so type checkers must use the mapping

        def __getattr__(self, name: str) -> Any:
            try:
                return dict(object.__getattribute__(self, "fields"))[name]
            except KeyError:
                raise AttributeError(f"{name!r} is not overridden") from None
