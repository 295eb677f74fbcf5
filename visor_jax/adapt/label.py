"""Labels questions of a training subset with the cheapest viable budget that is good enough (docs/method.md, 5).

Reads the universal model and `search/viable.json`; writes `labels/labels.npz` and `labels/labels.json`. A budget is
good enough if the likelihood it gives the reference answer is at least `1 - label.tolerance` of the full budget's.
Likelihood, unlike correctness, does not reward a lucky guess of a cheap budget. Several questions are scored per
picture; of budgets with the same cost, the viable list puts the better one first. `label.only_right` skips questions
that the full budget answers wrongly, because the budget they need is unknown.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from typing import Any

import numpy as np

from visor_jax.budget import bit_string, budget_name
from visor_jax.config import ConfigLike, as_config
from visor_jax.data.questions import Place, label_questions
from visor_jax.data.skips import SkipLog
from visor_jax.errors import RequestError
from visor_jax.evaluate.chunks import ChunkStore
from visor_jax.evaluate.features import FeatureStore
from visor_jax.evaluate.scoring import cheapest_good_enough, score
from visor_jax.files.read_write import write_bytes, write_json
from visor_jax.generate.visor import Visor
from visor_jax.scale.distributed import once
from visor_jax.scale.mesh import scoring_mesh
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.results import Labels, read_viable


def label_stage(config: ConfigLike, workdir: Workdir, model: Visor) -> Labels:
    """Scores every viable budget of the "universal" `model` on the training subset and writes each question's label."""
    config = as_config(config)
    viable = read_viable(workdir)
    skips = SkipLog()
    batches = label_questions(config, skips).batches(config.evaluate.batch_size)
    mesh, dtype = scoring_mesh(config), config.model.dtype
    identity = workdir.identity(config, "label")
    features = FeatureStore.of(config, workdir)
    chunks = ChunkStore(workdir, "labels", identity, "universal", with_features=features is not None)
    scores = score(model.params, batches, viable, model.arch, mesh=mesh, dtype=dtype, chunks=chunks, features=features)
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
        scores.num_visual,
    )
    tasks = np.array(scores.tasks)
    if config.label.only_right:
        correct = scores.correct[full]
        if not correct.any():
            raise RequestError("label.only_right=True: the full budget answers no question correctly; expected False")
        labels, tasks = labels.only(correct), tasks[correct]
    once(lambda: write(workdir, labels, tasks.tolist(), config.label.tolerance, skips, identity))
    chunks.remove()
    return labels


def write(
    workdir: Workdir,
    labels: Labels,
    tasks: list[str],
    tolerance: float,
    skips: SkipLog,
    identity: dict[str, Any] | None = None,
) -> None:
    """Writes the labels, and counts of the labels per task, to the workdir's folder `labels`."""
    packed = io.BytesIO()
    arrays = {n: getattr(labels, n) for n in ("label", "log_likelihood", "picture_index", "turn", "num_visual")}
    arrays["identity"] = None if identity is None else np.array(json.dumps(identity))
    arrays = {name: array for name, array in arrays.items() if array is not None}
    np.savez(packed, budgets=np.array([bit_string(bits) for bits in labels.budgets]), **arrays)
    names = [budget_name(labels.budgets[i]) for i in labels.label]
    by_task = {task: Counter(n for n, t in zip(names, tasks, strict=True) if t == task) for task in sorted(set(tasks))}
    summary = {"counts": Counter(names), "by_task": by_task, "samples": len(names), "tolerance": tolerance}
    summary["skipped"] = skips.by_reason()
    write_bytes(workdir.path / "labels" / "labels.npz", packed.getvalue())
    write_json(workdir.path / "labels" / "labels.json", json.loads(json.dumps(summary)))
