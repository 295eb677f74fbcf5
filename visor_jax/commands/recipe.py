"""Runs the stages that are not complete, then evaluates, reports and exports.

In: a validated configuration and a workdir. Every stage writes a `complete.json` (search and label: their result
files), and complete stages are skipped, so the same call resumes after any interruption.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from visor_jax.config import Config, ConfigLike, as_config, from_dict, validate
from visor_jax.config.mixture import MIXTURE_SUFFIXES, is_mixture, mixture_fields
from visor_jax.data.source_kind import split_read_by
from visor_jax.data.sources import SOURCES, SUFFIXES, check_source, named_kind, source_kind, source_of_file
from visor_jax.errors import RequestError, nearest
from visor_jax.evaluate.benchmarks import MODULES, benchmarks_of, is_file
from visor_jax.evaluate.benchmarks.base import Benchmark
from visor_jax.files.bucket import size_of
from visor_jax.files.read_write import as_path, read_json, read_regular
from visor_jax.scale.compiler_options import use_compile_cache
from visor_jax.scale.distributed import is_main, once
from visor_jax.workdir.fault_points import fault_point
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.goodput import Goodput
from visor_jax.workdir.lock import MAX_BYTES
from visor_jax.workdir.provenance import default_fields, differing_fields, plain
from visor_jax.workdir.supervision import supervised, watched
from visor_jax.workdir.visible import wait_until

RESULT_FILES = {"search": ("search/viable.json",), "label": ("labels/labels.npz", "labels/labels.json")}


def run_stages(config: ConfigLike, path: str, stages: Sequence[str], also_reads: Sequence[str] = ()) -> dict[str, Any]:
    """Completes `stages` in order.

    Args:
      config: the validated configuration.
      path: the workdir.
      stages: names of stages.
      also_reads: splits of the data that the caller reads afterwards.

    Returns:
      {"stages": seconds by stage}.

    Raises:
      RequestError: a split is empty that these stages, later ones of `config.stages` or the caller will read; raised
        before the first step.
    """
    config = as_config(config)
    check_source(config)
    workdir = Workdir(path)
    once(workdir.create)
    with supervised(), watched(config.train.hang_seconds), held(workdir, config):
        use_compile_cache(workdir.path)
        pending = once(lambda: [stage for stage in {*stages, *config.stages} if not is_complete(workdir, stage)])
        if pending:
            source_kind(config).check_splits(config, {*map(split_read_by, pending), *also_reads})
        if not {*pending}.isdisjoint(stages):
            once(lambda: claim_data(config, workdir))
        seconds = {stage: run_stage(config, workdir, stage) for stage in stages}
    return {"stages": seconds}


@contextlib.contextmanager
def held(workdir: Workdir, config: Config | None = None) -> Iterator[None]:
    """Locks a workdir for this run's processes; with a configuration, also claims it. Process 0 holds the lock.

    Raises:
      RequestError: another run holds it, it holds another configuration, or this process does not see it.
    """
    with contextlib.ExitStack() as stack:

        def acquire() -> str:
            lock = stack.enter_context(workdir.lock())
            if config is not None:
                stack.enter_context(workdir.claimed(config))
            return lock.token

        token = once(acquire)
        if not is_main():
            check_visible(workdir.path / "lock.json", token)
        yield


def check_visible(lock: Path, token: str) -> None:
    """Checks that this process sees the lock that process 0 has written; file systems of a network may take a while.

    Another run's lock does not count: a folder of the same name, left on this machine, is not the shared one.

    Raises:
      RequestError: it does not see it.
    """
    problem = ""

    def sees_token() -> bool:
        nonlocal problem
        try:
            if token.encode() in read_regular(lock, MAX_BYTES):
                return True
            problem = "holds something else"
        except FileNotFoundError:
            problem = "is not there"
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
        return False

    if not wait_until(sees_token):
        raise RequestError(
            f"--workdir: {lock} was written by process 0 and {problem} for this one; expected a folder that all"
            " machines share, or a bucket (gs://...)"
        )


def check_average(workdir: Workdir, config: Config) -> None:
    """Checks that `config` does not choose other weights than the stages were saved with.

    A folder without a `config.json` passes: loading a model from it says what is missing.

    Raises:
      RequestError: `train.use_ema`, or a stage's, differs from the workdir's.
    """
    if not (workdir.path / "config.json").exists():
        return
    for field, theirs, mine in differing_fields(plain(from_dict(workdir.config())), plain(config)):
        if field.endswith(".use_ema"):
            raise RequestError(
                f"{field}={mine}: {workdir.path} was trained with {theirs}, and its finished stages keep to that;"
                f" expected {theirs}, or another run"
            )


def is_complete(workdir: Workdir, stage: str) -> bool:
    """Returns whether a stage has written its result."""
    if stage in RESULT_FILES:
        return all((workdir.path / file).exists() for file in RESULT_FILES[stage])
    return workdir.stage(stage).is_complete()


def claim_data(config: Config, workdir: Workdir) -> None:
    """Checks that the data match those recorded in the workdir; records them the first time.

    Raises:
      RequestError: records, tokenizer or pictures have changed.
    """
    from visor_jax.data.fingerprint import fingerprint_of_split

    workdir.claim_data(config, fingerprint_of_split(config, "train"))


def check_complete(config: Config, workdir: Workdir, stage: str) -> None:
    """Checks that the result of a complete stage was made from the workdir's present inputs.

    Raises:
      RequestError: the inputs have changed.
    """
    from visor_jax.checkpoint.restoring import identity_of
    from visor_jax.config import architecture
    from visor_jax.workdir.results import Labels, check_made_of, read_viable

    if stage == "search":
        read_viable(workdir, architecture(config).num_slots)
    elif stage == "label":
        Labels.read(workdir)
    else:
        check_made_of(workdir, stage, identity_of(workdir.stage(stage)), workdir.stage(stage).path)


def keep_complete(config: Config, workdir: Workdir, stage: str) -> None:
    """Checks a complete stage, and removes what a kill after its result has left behind."""
    from visor_jax.evaluate.chunks import remove_all

    check_complete(config, workdir, stage)
    if stage in RESULT_FILES:
        remove_all(workdir, RESULT_FILES[stage][0].partition("/")[0])


def run_stage(config: Config, workdir: Workdir, stage: str) -> float:
    """Runs one stage unless it is complete; returns the seconds of this call."""
    if once(lambda: is_complete(workdir, stage)):
        once(lambda: keep_complete(config, workdir, stage))
        print(f"{stage}: complete", flush=True)
        return 0.0
    workdir.check_random_numbers()
    start = time.perf_counter()
    fault_point(stage)
    if stage == "search":
        from visor_jax.adapt.search import search_stage
        from visor_jax.budget import bit_string
        from visor_jax.loading import load_stage

        with timed(workdir, stage):
            viable = search_stage(config, workdir, load_stage(workdir, "full"))
        print("search: viable", ", ".join(bit_string(bits) for bits in viable))
    elif stage == "label":
        from visor_jax.adapt.label import label_stage
        from visor_jax.loading import load_stage

        with timed(workdir, stage):
            labels = label_stage(config, workdir, load_stage(workdir, "universal"))
        print(f"label: {len(labels.label)} questions")
    else:
        from visor_jax.train.loop import train

        train(config, stage, workdir)
    return time.perf_counter() - start


@contextlib.contextmanager
def timed(workdir: Workdir, name: str) -> Iterator[None]:
    """Adds the time of the block to `name` in the workdir's `goodput.json`."""
    goodput = Goodput(workdir.path / "goodput.json", written=is_main())
    with goodput.time(name):
        yield
    goodput.write()


def finish(config: ConfigLike, path: str) -> dict[str, Any]:
    """Evaluates, reports and exports a workdir whose stages are complete; keeps existing valid results."""
    config = as_config(config)
    from visor_jax.evaluate.runner import chunks_of, evaluate, evaluation_identity
    from visor_jax.export.model_card import about_stage
    from visor_jax.export.torch_export import export
    from visor_jax.loading import load
    from visor_jax.report.page import write_report

    workdir = Workdir(path)
    with supervised(), watched(config.train.hang_seconds), held(workdir):
        evaluated, exported = workdir.path / "eval" / "test.json", workdir.path / "export"
        model = load(workdir.path)
        fault_point("eval")

        def is_evaluated() -> bool:
            identity = evaluation_identity(config, model, workdir, "test")
            if current := is_current(evaluated, identity):
                for chunks in chunks_of(config, model, workdir, identity, "test").values():
                    chunks.remove()  # a kill after the result has left them
            return current

        if not once(is_evaluated):
            with timed(workdir, "eval"):
                evaluate(config, model, workdir)

        def publish() -> dict[str, Any]:
            write_report(workdir)  # also before the export, which may fail
            proof = exported / "parity.json"
            if not is_export_of(proof, model):
                with timed(workdir, "export"):
                    about = about_stage(config.export, workdir, model.stage)
                    export(model, exported, stage=model.stage, force=proof.exists(), about=about)
            report = write_report(workdir)
            return {
                "evaluation": read_json(evaluated),
                "report": str(report),
                "export": str(exported),
                "parity": read_json(proof),
            }

        return once(publish)


def is_current(result: Path, identity: dict[str, Any]) -> bool:
    """Returns whether a result file exists and was made with this model, data and settings."""
    record = read_json(result) if result.exists() else None
    theirs = record.get("identity") if isinstance(record, dict) else None
    if not isinstance(theirs, dict) or not isinstance(theirs.get("config"), dict):
        return False
    # A field that an earlier version did not have counts as its default.
    rest = [{k: v for k, v in one.items() if k not in ("config", "config_hash")} for one in (theirs, identity)]
    return rest[0] == rest[1] and not differing_fields(theirs["config"], identity["config"], default_fields())


def is_export_of(proof: Path, model: Any) -> bool:
    """Returns whether an export's parity.json exists, belongs to this model, and the export's files are complete."""
    record = read_json(proof) if proof.exists() else None
    if not isinstance(record, dict) or (record.get("stage"), record.get("model")) != (model.stage, model.fingerprint):
        return False
    files = record.get("files", {})  # earlier versions recorded none
    return isinstance(files, dict) and all(_is_intact(proof.parent / Path(name).name, files[name]) for name in files)


def _is_intact(file: Path, size: Any) -> bool:
    """Returns whether a file of an export exists; weights must have their size, other files may have been edited."""
    return file.is_file() and (file.suffix != ".safetensors" or size_of(file) == size)


def print_summary(result: dict[str, Any], path: str) -> None:
    """Prints the final table of `visor run`."""
    from visor_jax.evaluate.tables import print_budgets

    print_budgets(result["evaluation"])
    print("report:", result["report"])
    print("export:", result["export"])
    print(f"ask it: visor generate --workdir={path} --image=FILE --question=TEXT")


def public_benchmarks(benchmark: str, data: str, limit: int | None, workdir: str = "") -> list[Benchmark]:
    """Returns the benchmarks that `--benchmark` names: rows of the table, or Python files; none if it names none.

    Raises:
      RequestError: one of several names is unknown, a file cannot be used, `--data` is missing, or `--limit` does not
        fit.
    """
    names = [name.strip() for name in benchmark.split(",") if name.strip()]
    if not any(name in MODULES or is_file(name) for name in names):
        if limit is not None:
            raise RequestError(f"--limit={limit}: is for public benchmarks; expected --config.evaluate.samples={limit}")
        return []
    for name in names:
        if name not in MODULES and not is_file(name):
            hint = nearest(name, MODULES) or f"expected one of {', '.join(MODULES)}, or a Python file"
            raise RequestError(f"--benchmark={name}: {hint}")
    found = [one for name in dict.fromkeys(names) for one in benchmarks_of(name, workdir)]
    for name, count in Counter(one.name for one in found).items():
        if count > 1:
            raise RequestError(f"--benchmark={benchmark}: defines {name!r} twice; expected different names")
    if not data:
        repo = found[0].repo
        raise RequestError(f"--benchmark={benchmark}: needs --data=FOLDER, with the files of {repo}")
    if limit is not None and limit < 1:
        raise RequestError(f"--limit={limit}: expected at least 1")
    return found


def evaluation_data(config: Config, benchmark: str, data: str) -> Config:
    """Returns the configuration with another source of questions, as `--benchmark` and `--data` set it.

    Raises:
      RequestError: the source is unknown, or `--data` is missing or does not belong to it.
    """
    reading = [name for name in SOURCES if named_kind(name).from_file is not None]
    if benchmark and benchmark not in SOURCES:
        generated = ", ".join(name for name in SOURCES if name not in reading)
        hint = nearest(benchmark, [*MODULES, *SOURCES])
        raise RequestError(
            f"--benchmark={benchmark}: expected {generated}, or {' or '.join(reading)} with --data=FILE, or public"
            f" benchmarks with --data=FOLDER ({', '.join(MODULES)})" + (f"; {hint}" if hint else "")
        )
    name = benchmark or ((source_of_file(data) or reading[0]) if data else config.data.source)
    if data and name not in reading:
        raise RequestError(
            f"--benchmark={name}: is generated and takes no --data={data}; expected --benchmark={reading[0]}"
        )
    if not data and not benchmark:
        return config
    if not data and benchmark == config.data.source and not is_mixture(vars(config.data)):
        return config
    if not benchmark and data.lower().endswith(MIXTURE_SUFFIXES):
        data_fields: dict[str, Any] = mixture_fields(as_path(data))
    else:
        data_fields = _file_fields(name, data)
    # Nothing is trained here, so checks of the stages' data do not apply.
    new_data = dataclasses.replace(config.data, **data_fields)
    changed = validate(dataclasses.replace(config, stage="", stages=(), data=new_data))
    check_source(changed)
    return changed


def _file_fields(name: str, data: str) -> dict[str, Any]:
    """Returns the fields of `config.data` for the source `name` and the file of `--data`."""
    from_file = named_kind(name).from_file
    single = {"source": name, "mixture": "", "parts": (), "question_part": "", "sampling": "all"}
    if from_file is None:
        return {**single, "path": ""}
    if not data:
        raise RequestError(f"--benchmark={name}: needs --data=FILE, the file with the questions")
    return {**single, **from_file(_question_file(data))}


def _question_file(data: str) -> Path:
    """Returns the file that `--data` names, or the only file in the folder that it names."""
    file = as_path(data)
    if not file.is_dir():
        return file
    files = sorted(path for path in file.iterdir() if source_of_file(path))
    if len(files) != 1:
        raise RequestError(f"--data={data}: expected one {', '.join(SUFFIXES)} file in the folder, found {len(files)}")
    return files[0]
