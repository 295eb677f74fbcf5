"""Reads how a task of lmms-eval wants its answers: `generation_kwargs` of its YAML file, or `--gen_kwargs`.

In: the settings of a request. Out: `Settings`, or an error for those that would give other answers than asked for.
Settings that a picture's processing takes, such as `image_aspect_ratio`, are the trained model's own and ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from visor_jax.errors import RequestError

NO_STOP = "\n\n"  # the harness adds it to tasks without `until`; its own models ignore it too, as it would cut answers


@dataclass(frozen=True)
class Settings:
    """How the answers of a task are generated."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    until: tuple[str, ...] = ()
    seed: int = 0


def read_settings(given: Mapping[str, Any], max_new_tokens: int, seed: int) -> Settings:
    """Reads a task's `generation_kwargs`.

    Raises:
      RequestError: they ask for beams or top-k sampling, which would give other answers than greedy ones or ours.
    """
    sampled = bool(given.get("do_sample", True)) and float(given.get("temperature") or 0) > 0
    if (beams := given.get("num_beams") or 1) != 1:
        raise RequestError(f"num_beams={beams}: expected 1; pass --gen_kwargs num_beams=1")
    if sampled and given.get("top_k"):
        raise RequestError(f"top_k={given['top_k']}: expected top_p or neither; pass --gen_kwargs top_k=0")
    until = given.get("until") or ()
    stops = [until] if isinstance(until, str) else until
    return Settings(
        max_new_tokens=int(given.get("max_new_tokens") or max_new_tokens),
        temperature=float(given["temperature"]) if sampled else 0.0,
        top_p=float(given.get("top_p") or 1.0) if sampled else 1.0,
        until=tuple(text for text in stops if text and text != NO_STOP),
        seed=seed if sampled else 0,
    )


def cut(text: str, until: Sequence[str]) -> str:
    """Returns a text up to the first of the texts that end it."""
    for stop in until:
        text = text.partition(stop)[0]
    return text
