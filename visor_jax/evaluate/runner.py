"""Evaluates a trained model on a held-out split: accuracy and cost of every viable budget and the policy.

`evaluate` returns the object that `visor evaluate --json` prints. It also writes it to `eval/<split>.json`
(`eval/<name>/<split>.json` for other data than the run's own), with the dial's curve, the routes by task, and a few
example pictures for the report. `<split>.questions.json` beside it says which questions each budget answers. Of a
source with controls, the first questions are also asked about gray pictures and about those of other questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from visor_jax.budget import Bits
from visor_jax.config import Config, ConfigLike, as_config
from visor_jax.config.mixture import is_mixture
from visor_jax.data.controls import CONTROLS
from visor_jax.data.fingerprint import fingerprint_of_split
from visor_jax.data.skips import SkipLog
from visor_jax.data.sources import source_kind, source_label
from visor_jax.evaluate.against import OtherAnswers
from visor_jax.evaluate.chunks import ChunkStore
from visor_jax.evaluate.configured import in_dtype_of, with_system
from visor_jax.evaluate.dense_start import DENSE_START, dense_start
from visor_jax.evaluate.examples import write_examples
from visor_jax.evaluate.features import FeatureStore
from visor_jax.evaluate.harness import answers_record, check_place, harness
from visor_jax.evaluate.latency import median_place, time_answers
from visor_jax.evaluate.measure import Measured, measure, requested_budgets
from visor_jax.files.bucket import is_bucket
from visor_jax.files.read_write import as_path, write_json
from visor_jax.loading import Visor
from visor_jax.scale.distributed import once
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.provenance import annotations_checksum, plain


def evaluate(
    config: ConfigLike,
    model: Visor,
    workdir: Workdir,
    *,
    split: str = "test",
    budgets: Sequence[str] | None = None,
    name: str = "",
    against: OtherAnswers | None = None,
) -> dict[str, Any]:
    """Scores `model` on a split and writes `eval/<split>.json`.

    Args:
      budgets: names of the budgets to evaluate; None means every viable one, and "auto" if the model has a policy.
      name: name of the data if not the run's own; results go to this folder below `eval/`.
      against: another run's answers to the same questions; None: there is no comparison.

    Raises:
      RequestError: a budget is unknown or needs a policy, there is no usable question, or one that `against` lacks.
    """
    config = as_config(config)
    requested, folder = requested_budgets(model, budgets), workdir.path / "eval" / name  # reports mistakes first
    if against:
        against.paired_with(list(requested))
    asked_of = records_of(config) if name.startswith("of_") else ""  # other results may be replaced
    if asked_of:
        check_place(folder / f"{split}.json", asked_of)
    start = dense_start(config, model, workdir) if config.evaluate.dense_start else None
    skips, identity = SkipLog(), evaluation_identity(config, model, workdir, split)
    chunks, features = chunks_of(config, model, workdir, identity, split, name), FeatureStore.of(config, workdir)
    measured = measure(
        config, model, split, requested, skips=skips, start=start, chunks=chunks, features=features, against=against
    )
    answers = measured.answered["budgets"]
    result = {
        "benchmark": source_label(config),
        "split": split,
        "file": file_of(config),
        **({"asked_of": asked_of} if asked_of else {}),
        "stage": model.stage,
        "plan": model.arch.plan,
        "identity": identity,
        "skipped": skips.by_reason(),
        "harness": harness_of(config, model, measured),
        **measured.figures,
        **({"against": against.compared(answers, measured.scores.levels)} if against else {}),
        **timing(config, model, measured, requested),
    }
    # Only process 0 has the examples: their maps would be too large a message for the others, which write nothing.
    own = with_system(in_dtype_of(config, model), config.tokenizer.system)  # as the questions were scored
    once(lambda: result.update(examples=write_examples(folder, split, own, measured)))
    once(partial(write, folder, split, result, measured))
    for store in chunks.values():
        store.remove()
    return result


def write(folder: Path, split: str, result: dict[str, Any], measured: Measured) -> None:
    """Writes which questions each budget answers, and the result."""
    path = folder / f"{split}.questions.json"
    write_json(path, measured.answered)
    result["answers"] = answers_record(path)
    write_json(folder / f"{split}.json", result)


def chunks_of(
    config: Config, model: Visor, workdir: Workdir, identity: dict[str, Any], split: str, name: str = ""
) -> dict[str, ChunkStore]:
    """Returns the scored chunks of the evaluation with this identity: of its questions (""), by control, and so on.

    The splits of a source have questions at the same places, so chunks also depend on the split and its records.
    """
    with_features, folder = FeatureStore.of(config, workdir) is not None, f"eval/{name}"
    identity = {**identity, "split": split, "records": annotations_checksum(plain(config), split)}
    own = ChunkStore(workdir, folder, identity, model.stage, with_features=with_features)
    controls = {
        control: ChunkStore(workdir, folder, {**identity, "control": control}, model.stage, with_features=False)
        for control in (*(CONTROLS if source_kind(config).controls else ()), DENSE_START)
    }
    return {"": own, **controls}


def evaluation_identity(config: ConfigLike, model: Visor, workdir: Workdir, split: str) -> dict[str, Any]:
    """Identifies what an evaluation depends on: the run's model, the settings, and the current data."""
    config = as_config(config)
    pictures = fingerprint_of_split(config, split)
    return workdir.identity(config, "evaluate", model=model.stage, pictures=pictures)


def file_of(config: Config) -> str:
    """Returns the name of the file that the questions come from; "" for generated ones."""
    return Path(records_of(config)).name


def records_of(config: Config) -> str:
    """Returns the absolute path of the file that the questions come from; "" for generated ones."""
    if is_mixture(vars(config.data)):
        name = config.data.mixture
    else:
        name = config.data.path if source_kind(config).from_file else ""
    if not name:
        return ""
    path = as_path(config.data.root) / name
    return str(path if is_bucket(path) else path.absolute())


def harness_of(config: Config, model: Visor, measured: Measured) -> dict[str, Any]:
    """Returns the harness of the scores: one pass over each reference answer, as `scoring` explains."""
    sample = measured.questions.find(measured.scores.ids[0])
    settings = {"dtype": config.model.dtype, "right": "the greedy answer is the reference, token by token"}
    system = sample.system or config.tokenizer.system or None
    return harness(model, sample.turns[0].question, len(sample.images), system=system, **settings)


def timing(
    config: Config, model: Visor, measured: Measured, requested: Mapping[str, Bits | None]
) -> dict[str, dict[str, Any]]:
    """Returns {"timing": the times of one question, of median length}; process 0 measures them.

    {} without rounds, and where that question leaves no room for an answer (`max_positions`).
    """
    if not config.evaluate.timing_rounds:
        return {}
    scores = measured.scores
    sizes = (scores.num_visual + scores.num_prompt).tolist()
    place = median_place(sizes)
    room = model.arch.text.max_positions - sizes[place]
    if room < 1:
        return {}

    def timed() -> dict[str, Any]:
        sample = measured.questions.find(scores.ids[place])
        asked = with_system(in_dtype_of(config, model), sample.system or config.tokenizer.system)
        answer = partial(asked.timed_answer, list(sample.images), sample.turns[0].question, origin=sample.origin)
        times = time_answers(answer, requested, room=room, rounds=config.evaluate.timing_rounds)
        tokens = {"visual_tokens": int(scores.num_visual[place]), "text_tokens": int(scores.num_prompt[place])}
        question = {"id": scores.ids[place], "tiles": int(scores.num_tiles[place]), **tokens}
        return {"dtype": config.model.dtype, "question": question, **times}

    return {"timing": once(timed)}
