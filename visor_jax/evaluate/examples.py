"""Writes example answers with their pictures, for the report: for each task right and wrong ones.

In: the scores of an evaluation. Out: pictures in a folder for each split, below `examples/`
beside the result, and the objects of its "examples".
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from visor_jax.budget import Bits, Budget
from visor_jax.data.chat_template import IMAGE_MARKER
from visor_jax.data.collate import Batch
from visor_jax.data.questions import Place
from visor_jax.data.sample import still
from visor_jax.evaluate.configured import with_system
from visor_jax.evaluate.measure import Measured, policy_correct, policy_picks
from visor_jax.evaluate.relevance import cross_attention_maps, patch_relevance
from visor_jax.files.read_write import write_bytes
from visor_jax.loading import Visor
from visor_jax.workdir.supervision import beat

NEW_TOKENS = 64  # of an example's answer, which is wrong or right by its score, however much of it is shown
MAX_SIDE = 1024  # pixels of an example's picture


def write_examples(folder: Path, split: str, model: Visor, measured: Measured) -> list[dict[str, Any]]:
    """Answers questions of every task, one right and one wrong if there are both, and writes their pictures.

    The policy chooses the budget; without one all slots are on, or as many as were evaluated. Of several pictures the
    first is written, of a video its first frame; "image" is "" if there is none. "right" is the score of the
    evaluation. "relevance" has, by rows, how much the reference answer depends on each patch of the first tile, in
    percent of the most relevant one; null if it is not computed. "attention" has the same for the attention of every
    cross-attention layer. Questions that leave no room for an answer (`max_positions`) are no examples.
    """
    scores, examples = measured.scores, []
    if model.has_policy:
        picked = policy_picks(model, scores, 0.0)
        right, budgets = policy_correct(scores, picked), [model.viable_budgets[index] for index in picked]
    else:
        costliest = max(scores.budgets, key=sum)
        right, budgets = scores.correct[scores.budgets.index(costliest)], [costliest] * len(scores.ids)
    room = model.arch.text.max_positions - scores.num_visual - scores.num_prompt  # [N]
    for index in example_places(scores.tasks, right):
        beat()
        if (length := min(NEW_TOKENS, int(room[index]))) < 1:
            continue
        id, bits = scores.ids[index], budgets[index]
        sample = measured.questions.find(id)
        question, budget = sample.turns[0].question, Budget("full") if all(bits) else Budget.of(bits)
        prompted = with_system(model, sample.system) if sample.system else model
        answer = prompted.answer(list(sample.images), question, budget, max_new_tokens=length, origin=sample.origin)
        name = f"examples/{split}/{index}.png" if sample.images else ""
        if sample.images:
            write_bytes(folder / name, png(still(sample.images[0])))
        examples.append(
            {
                "index": index,
                "image": name,
                "question": question.replace(IMAGE_MARKER, "").strip(),
                "answer": sample.turns[0].answer,
                "prediction": answer.text,
                "right": bool(right[index]),
                "budget": str(budget),
                "task": scores.tasks[index],
                **(maps(model, batch_of(measured, id), bits) if len(sample.images) == 1 else {}),
                "decoder_gflops": answer.decoder_flops / 1e9,
            }
        )
    return examples


def example_places(tasks: Sequence[str], right: Sequence[bool] | np.ndarray) -> list[int]:
    """Returns two questions of each task: the first right and the first wrong one, or else the first two."""
    by_task: dict[str, list[int]] = {}
    for place, task in enumerate(tasks):
        by_task.setdefault(task, []).append(place)
    chosen = []
    for places in by_task.values():
        other = next((place for place in places if bool(right[place]) != bool(right[places[0]])), None)
        chosen += places[:2] if other is None else [places[0], other]
    return sorted(chosen)


def batch_of(measured: Measured, id: str) -> Batch:
    """Returns a batch of one question with its reference answer."""
    return measured.questions.batch([measured.questions.example(Place.of(id))], 1)


def maps(model: Visor, batch: Batch, bits: Bits) -> dict[str, Any]:
    """Returns "relevance" and "attention" of the answer in a batch of one question with one picture."""
    relevance = patch_relevance(model.params, batch, bits, model.arch)
    layers = cross_attention_maps(model.params, batch, bits, model.arch)
    return {
        "relevance": None if relevance is None else in_percent(relevance),
        "attention": [
            {"layer": layer, "on_tile": on_tile, "patches": in_percent(patches)} for layer, on_tile, patches in layers
        ],
    }


def in_percent(patches: Float[np.ndarray, "S S"]) -> list[list[int]]:
    """Returns values from 0 to 1 as whole percents."""
    return np.rint(100 * patches).astype(int).tolist()


def png(image: np.ndarray) -> bytes:
    """Encodes an image (uint8 [height, width, 3]) as PNG, scaled down to `MAX_SIDE` pixels if it is larger."""
    picture, buffer = Image.fromarray(image), io.BytesIO()
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
