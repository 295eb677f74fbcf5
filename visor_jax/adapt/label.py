"""Label: the cheapest viable budget that is good enough, for every question of a training subset (docs/method.md, 5).

In: the universal model and `search/viable.json`. Out: `labels/labels.npz` and `labels/labels.json`. A budget is good
enough where the likelihood it gives the reference answer reaches `1 - label.tolerance` of the full budget's: likelihood
and not correctness, so that a lucky guess of a cheap budget is not taken for knowledge. Several questions are
asked about every picture, and of budgets that cost the same the better stands first in the viable list. With
`label.only_right` questions that the full budget answers wrongly are left out: what they need cannot be seen.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from typing import Any

import numpy as np

from visor_jax.budget import Bits, bit_string, budget_name
from visor_jax.data.draws import index_range
from visor_jax.data.from_config import glyphs_source, make_source
from visor_jax.data.glyphs.source import TASKS
from visor_jax.data.questions import Place, Questions
from visor_jax.data.sample import Source
from visor_jax.data.skips import SkipLog
from visor_jax.errors import RequestError
from visor_jax.evaluate.scoring import score
from visor_jax.scale.mesh import scoring_mesh
from visor_jax.workdir.folder import Workdir, parse_json, write_bytes, write_json
from visor_jax.workdir.provenance import short
from visor_jax.workdir.results import check_made_of, read_npz, read_viable

FIRST_INDEX = index_range("label")[1].start  # of the generated pictures that labels are made on

MOST_INDEX = 2**53  # of a record or a turn
ARRAYS = {
    "budgets": ("U", 1),
    "label": ("iu", 1),
    "log_likelihood": ("f", 2),
    "picture_index": ("iu", 1),
    "turn": ("iu", 1),
    "identity": ("U", 0),
}
MADE_OF_OTHERS = "the labels were made of other data: remove labels/ and run the label stage again"


@dataclasses.dataclass(frozen=True)
class Labels:
    """Pseudo-labels: `label[i]` indexes `budgets` (the viable ones, cheapest first) for question `ids[i]`.

    `picture_index[i]` and `turn[i]` find the question again in the source; `log_likelihood` is [N, budgets].
    """

    budgets: list[Bits]
    label: np.ndarray
    log_likelihood: np.ndarray
    picture_index: np.ndarray
    turn: np.ndarray

    @classmethod
    def read(cls, workdir: Workdir) -> Labels:
        """The labels of a workdir.

        Raises:
          RequestError: the label stage has not run, the file does not hold what it wrote, or it was made of something
            else than what lies there now: other viable budgets, another model, other data.
        """
        path = workdir.path / "labels" / "labels.npz"
        if not path.exists():
            raise RequestError(f"{path}: not found; run the label stage first (visor label --workdir={workdir.path})")
        saved, viable = (
            read_npz(path, ARRAYS, may_lack=("identity",), again="run the label stage again"),
            read_viable(workdir),
        )
        identity = str(saved.pop("identity")) if "identity" in saved else None
        try:
            check_made_of(workdir, "label", None if identity is None else parse_json(identity), path)
        except ValueError as error:
            raise RequestError(f"{path}: damaged ({error}); remove it and run the label stage again") from error
        names = [str(name) for name in saved.pop("budgets")]
        if names != [bit_string(bits) for bits in viable]:
            raise RequestError(
                f"{path}: made for the budgets {short(names)}, and search/viable.json holds others; remove it and run"
                " the label stage again"
            )
        labels = cls(viable, **saved)
        if problem := labels.problem():
            raise RequestError(f"{path}: {problem}; remove it and run the label stage again")
        return labels

    def problem(self) -> str:
        """What no label stage writes; "" where there is nothing."""
        count, num_budgets = len(self.label), len(self.budgets)
        if not count:
            return "holds no label"
        if self.log_likelihood.shape != (count, num_budgets):
            return f"log_likelihood has shape {self.log_likelihood.shape}, expected {(count, num_budgets)}"
        if not len(self.picture_index) == len(self.turn) == count:
            return f"{count} labels of {len(self.picture_index)} pictures and {len(self.turn)} turns"
        for name, values, most in (
            ("label", self.label, num_budgets - 1),
            ("picture_index", self.picture_index, MOST_INDEX),
            ("turn", self.turn, MOST_INDEX),
        ):
            if values.min() < 0 or values.max() > most:
                return f"{name} goes from {values.min()} to {values.max()}, expected from 0 to {most}"
        return "" if np.isfinite(self.log_likelihood).all() else "log_likelihood is not finite"

    def only(self, rows: np.ndarray) -> Labels:
        """Those of some questions, told by booleans or indices."""
        arrays = (self.label, self.log_likelihood, self.picture_index, self.turn)
        return Labels(self.budgets, *(array[rows] for array in arrays))


def label_source(config: Any) -> Source:
    """What labels are made on: the training records; of the generated data, pictures that ask about one task each."""
    if config.data.source != "glyphs":
        return make_source(config, "train")
    turns = config.data.turns_per_picture
    return glyphs_source(config, "train", tasks=tuple(TASKS), turns_per_picture=turns)


def questions(config: Any, skips: SkipLog | None = None) -> Questions:
    """The questions of the training subset, about `label.samples` of them.

    Generated tasks are asked about equally often, so that the policy meets each as often as the others.
    """
    count, source = config.label.samples, label_source(config)
    if config.data.source != "glyphs":
        return Questions(config, source, count, skips=skips)
    return Questions(config, source, count, first=FIRST_INDEX, per_task=-(-count // len(TASKS)), skips=skips)


def cheapest_good_enough(log_likelihood: np.ndarray, full: int, tolerance: float) -> np.ndarray:
    """For [N, budgets] cheapest first: the first that reaches 1 - tolerance of the full budget's likelihood."""
    enough = log_likelihood >= log_likelihood[:, full : full + 1] + np.log1p(-tolerance)
    enough[:, full] = True
    return enough.argmax(axis=1)


def label_stage(config: Any, workdir: Workdir) -> Labels:
    """Score every viable budget on the training subset, and write down each question's label."""
    from visor_jax.loading import load_stage

    model, viable = load_stage(workdir, "universal"), read_viable(workdir)
    skips = SkipLog()
    batches = questions(config, skips).batches(config.evaluate.batch_size)
    mesh, dtype = scoring_mesh(config), config.model.dtype
    scores = score(model.params, batches, viable, model.arch, mesh=mesh, dtype=dtype)
    places = [Place.of(id) for id in scores.ids]
    log_likelihood = scores.log_likelihood.T
    full = viable.index((True,) * model.arch.num_slots)
    label = cheapest_good_enough(log_likelihood, full, config.label.tolerance)
    labels = Labels(
        viable,
        label,
        log_likelihood,
        np.array([place.index for place in places]),
        np.array([place.turn for place in places]),
    )
    tasks = np.array(scores.tasks)
    if config.label.only_right:
        right = scores.correct[full]
        if not right.any():
            raise RequestError("label.only_right=True: the full budget answers no question rightly; expected False")
        labels, tasks = labels.only(right), tasks[right]
    write(workdir, labels, tasks.tolist(), config.label.tolerance, skips, workdir.identity(config, "label"))
    return labels


def write(
    workdir: Workdir,
    labels: Labels,
    tasks: list[str],
    tolerance: float,
    skips: SkipLog,
    identity: dict[str, Any] | None = None,
) -> None:
    packed = io.BytesIO()
    arrays = {n: getattr(labels, n) for n in ("label", "log_likelihood", "picture_index", "turn")}
    arrays |= {} if identity is None else {"identity": np.array(json.dumps(identity))}
    np.savez(packed, budgets=np.array([bit_string(bits) for bits in labels.budgets]), **arrays)
    names = [budget_name(labels.budgets[i]) for i in labels.label]
    by_task = {task: Counter(n for n, t in zip(names, tasks, strict=True) if t == task) for task in sorted(set(tasks))}
    summary = {"counts": Counter(names), "by_task": by_task, "samples": len(names), "tolerance": tolerance}
    summary["skipped"] = skips.by_reason()
    write_bytes(workdir.path / "labels" / "labels.npz", packed.getvalue())
    write_json(workdir.path / "labels" / "labels.json", json.loads(json.dumps(summary)))
