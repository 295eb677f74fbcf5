"""Describes how an evaluation asked its questions, so that its scores can be compared with those of another harness.

In: the model and a question. Out: `harness`, JSON values that every result has and `visor evaluate` prints;
`answers_record`, which ties a result to the file of its answers; and `check_place`, which keeps results of other
questions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from visor_jax.data import chat
from visor_jax.data.sample import SkipSample
from visor_jax.errors import RequestError
from visor_jax.files.read_write import read_json
from visor_jax.loading import Visor
from visor_jax.workdir.provenance import file_sha256, git_revision, versions

NAME = "visor_jax"


def harness(model: Visor, question: str, num_pictures: int, *, system: str | None, **settings: Any) -> dict[str, Any]:
    """Returns the harness: its name, git revision and versions, the prompt of one question, and further settings.

    Args:
      question: the first of the questions, with the text that asks for a short answer.
      num_pictures: of the question.
      system: the system text; None or "": none.
      settings: how answers are scored or generated.
    """
    return {
        "name": NAME,
        "git_revision": git_revision(),
        "versions": versions(),
        "decoding": "greedy",
        **settings,
        "system": system or "",
        "first_prompt": rendered(model, question, num_pictures, system),
    }


def answers_record(path: Path) -> dict[str, str]:
    """Returns the name and sha256 of the file of the answers, by which a reader knows that a result is theirs."""
    return {"file": path.name, "sha256": file_sha256(path)}


def check_place(path: Path, asked_of: str) -> None:
    """Refuses to replace the result of other questions, whose file or benchmark has the same name.

    Args:
      path: of the result.
      asked_of: what the questions come from, the result's "asked_of"; results of earlier versions have none.

    Raises:
      RequestError: there is such a result.
    """
    if not path.is_file():
        return
    record = read_json(path)
    theirs = record.get("asked_of", asked_of) if isinstance(record, dict) else asked_of
    if theirs != asked_of:
        raise RequestError(
            f"{path}: has the answers to the questions of {theirs}, which these of {asked_of} would replace; expected"
            " another name: rename the file, or move or remove the earlier result"
        )


def rendered(model: Visor, question: str, num_pictures: int, system: str | None) -> str:
    """Returns a prompt as the model reads it, with its chat tokens and one marker for each picture; "" if it has none.

    A question whose markers do not fit its pictures has no prompt.
    """
    (marked,) = chat.mark_pictures([question], num_pictures)
    try:
        token_ids = chat.encode_prompt(model.tokenizer, marked, num_pictures, system)
    except SkipSample:
        return ""
    return model.tokenizer.decode(token_ids, keep_special=True)
