"""Inspect a configuration's data before or without training.

    visor data check --config=configs/X.py      runs every record through the whole pipeline and counts skipped ones;
        exit status 1 if training would stop; --list=FILE writes one JSON object per record and line; --workers=N checks
        in N processes; a check that is killed continues when it is run again (--restart: from the beginning)
    visor data stats --config=configs/X.py      prints sizes of samples, and how many fit the configured row shape
    visor data preview --config=configs/X.py --out=sheet.png      draws what the model will see: tiles, tokens by kind
        and loss mask, a packed row; --view=pictures draws a contact sheet with the questions
    visor data build --config=configs/X.py --out=DIR      writes samples as PNG files and LLaVA JSON

Without --split, all splits are read (`preview`: the first samples). Generated data is endless: --samples limits each
split.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from visor_jax.config import Config, stage_config
from visor_jax.config.schema import TRAINED_STAGES
from visor_jax.data.build import FORMATS, build
from visor_jax.data.check import Running, check
from visor_jax.data.collate import Example, RowShape
from visor_jax.data.from_config import (
    make_source,
    make_tokenizer,
    sample_encoder,
    stage_parts,
    stage_phases,
    training_row_shape,
)
from visor_jax.data.preview import contact_sheet
from visor_jax.data.preview_model import UNPACKED_ROWS, model_sheet
from visor_jax.data.sample import Sample, Sheet, SkipSample, Source, samples_of
from visor_jax.data.skips import SkipLog
from visor_jax.data.source_kind import SPLITS
from visor_jax.data.sources import source_kind
from visor_jax.errors import RequestError, RunError, printable, unwritable
from visor_jax.files.read_write import as_path, replaceable

HELP = "check, measure, preview or write out the data of a configuration"
CONFIG = "workdir"

GENERATED_SAMPLES = 1000  # of each split of generated data, unless --samples is given
PREVIEW_SAMPLES = {"model": 6, "pictures": 12}  # by --view
_BINS = 10  # of a histogram
_BAR = 40  # characters of its longest bar
_MAX_WORKERS = 1024
_MAX_PICTURES = 1000  # of one record, independent of the row shape
_ANY_SIZE = RowShape(tiles=1 << 30, visual=1 << 30, text=1 << 30)

_log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("action", choices=("check", "stats", "preview", "build"))
    parser.add_argument("--split", choices=SPLITS, default="", help="only this split")
    parser.add_argument("--samples", type=_count, metavar="N", help="limit on the samples of a split")
    parser.add_argument("--list", metavar="FILE", help="check: write the result of every record, as JSON lines")
    parser.add_argument(
        "--workers", type=_number, metavar="N", help="check: processes; 0: this one (default: data.workers)"
    )
    parser.add_argument("--restart", action="store_true", help="check: drop what a killed check has found")
    parser.add_argument(
        "--view", choices=[*PREVIEW_SAMPLES], help="preview: what the model sees (default), or pictures with questions"
    )
    parser.add_argument("--out", metavar="PATH", help="preview: the PNG file; build: the folder, which must not exist")
    parser.add_argument("--format", choices=FORMATS, help="build: llava (default) or array_record")
    parser.add_argument("--shards", type=_count, default=1, metavar="N", help="build: files per split of array_record")


def main(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Runs the action; returns its counts."""
    if args.action in ("preview", "build") and not args.out:
        raise RequestError(f"data {args.action}: --out is missing; expected --out=PATH, where to write")
    if args.action == "preview" and Path(args.out).suffix.lower() != ".png":
        raise RequestError(f"data preview: --out={args.out}: expected a name that ends with .png, the picture's format")
    if args.list is not None and (args.action != "check" or not args.list):
        raise RequestError(f"data {args.action}: --list={args.list} belongs to data check; expected --list=FILE there")
    if args.action != "check" and (args.workers is not None or args.restart):
        flag = "--restart" if args.restart else f"--workers={args.workers}"
        raise RequestError(f"data {args.action}: {flag} belongs to data check; expected it there")
    if args.view is not None and args.action != "preview":
        raise RequestError(f"data {args.action}: --view={args.view} belongs to data preview; expected it there")
    if args.action != "build" and (args.format or args.shards != 1):
        raise RequestError(f"data {args.action}: --format and --shards belong to data build")
    sources = _sources(_of_any_size(config) if args.action in ("stats", "build") else config, args.split)
    limit = args.samples or (GENERATED_SAMPLES if source_kind(config).endless else None)
    if args.action == "check":
        workers = config.data.workers if args.workers is None else args.workers
        running = Running(workers=workers, listing=args.list, restart=args.restart)
        return check(config, sources, limit, whole=not args.split, running=running)
    if args.action == "stats":
        return _stats(config, sources, limit)
    try:
        if args.action == "build":
            return build(sources, as_path(args.out), format=args.format or "llava", shards=args.shards, limit=limit)
        count = args.samples or PREVIEW_SAMPLES[args.view or "model"]
        return _preview(sources, count, replaceable(args.out), config, args)
    except OSError as error:
        raise unwritable(f"--out={args.out}", error) from error


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) > _MAX_WORKERS:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 0 to {_MAX_WORKERS}")
    return int(text)


def _sources(config: Config, split: str) -> dict[str, Source]:
    """Returns the configured source by split; without a split, a single file is one source."""
    names = [split] if split else source_kind(config).stored_splits(config)
    return {name: make_source(config, name) for name in names}


def _of_any_size(config: Config) -> Config:
    """Returns the configuration with a large limit on a record's pictures, to measure records beyond it too."""
    tiles = max(config.data.tiles, _MAX_PICTURES)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tiles=tiles))


def _usable(
    source: Source, limit: int | None, skips: SkipLog, use: Callable[[Sample | Sheet], ResultT]
) -> Iterator[ResultT]:
    """Yields the result of `use` for the source's samples, in order; counts skipped samples."""
    for index in range(min(len(source), limit or len(source))):
        skips.count_tried()
        try:
            result = use(source[index])
        except SkipSample as why:
            skips.count_skipped(source.name, index, why)
        else:
            yield result


# --- stats ------------------------------------------------------------------------------------------------------------


def _stats(config: Config, sources: dict[str, Source], limit: int | None) -> dict[str, Any]:
    encode = sample_encoder(config, make_tokenizer(config), _ANY_SIZE)
    skips = SkipLog()
    tasks: Counter[str] = Counter()
    sizes: dict[str, list[int]] = {}
    for source in sources.values():
        for example in _usable(source, limit, skips, encode):
            for name, value in _measures(example).items():
                sizes.setdefault(name, []).append(value)
            tasks.update(task or "(none)" for task in example.tasks)
    if not sizes:
        raise RequestError(
            f"data: none of {skips.tried} samples can be used ({skips.by_reason()}); see visor data check"
        )
    room = dataclasses.asdict(training_row_shape(config))
    lengths = {name: _summary(values, room.get(name)) for name, values in sizes.items()}
    print(f"{skips.tried - skips.skipped} samples, {skips.skipped} skipped")
    for name, summary in lengths.items():
        _print_summary(name, summary)
    print("turns by task: " + ", ".join(f"{printable(task)} {count}" for task, count in sorted(tasks.items())))
    return {
        "samples": skips.tried - skips.skipped,
        "skipped": skips.skipped,
        "lengths": lengths,
        "tasks": dict(sorted(tasks.items())),
    }


def _measures(example: Example) -> dict[str, int]:
    """Returns the sizes of one sample; the first three are dimensions of the row shape."""
    shared = {} if example.text_turns is None else {"shared": int((example.text_turns == 0).sum())}  # text tokens
    counts = {"targets": int(example.loss_mask.sum()), "turns": len(example.tasks)}
    return {**dataclasses.asdict(example.size), **shared, **counts}


def _summary(values: Sequence[int], room: int | None) -> dict[str, Any]:
    width = -(-(max(values) - min(values) + 1) // _BINS)
    counts, edges = np.histogram(values, bins=np.arange(min(values), max(values) + width + 1, width))
    summary: dict[str, Any] = {
        "min": min(values),
        "median": float(np.median(values)),
        "p95": float(np.quantile(values, 0.95)),
        "max": max(values),
        "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
    }
    if room is not None:
        summary |= {"room": room, "fit": sum(value <= room for value in values) / len(values)}
    return summary


def _print_summary(name: str, summary: dict[str, Any]) -> None:
    room = f"; {summary['fit']:.1%} fit in the configured {summary['room']}" if "room" in summary else ""
    low, high, median, p95 = summary["min"], summary["max"], summary["median"], summary["p95"]
    print(f"{name}: {low} to {high}, median {median:g}, 95 % up to {p95:g}{room}")
    counts, edges = summary["histogram"]["counts"], summary["histogram"]["edges"]
    if low < high:
        for count, start, end in zip(counts, edges[:-1], edges[1:], strict=True):
            print(f"  {start:>8} to {end - 1:<8} {'#' * round(_BAR * count / max(counts)):<{_BAR}} {count}")


# --- preview ----------------------------------------------------------------------------------------------------------


def _preview(sources: dict[str, Source], count: int, out: Path, config: Config, args: argparse.Namespace) -> Any:
    """Draws the first usable samples, and rows of a batch: of the first step, or filled from the samples drawn.

    Samples of a sheet are drawn one by one.
    """
    skips = SkipLog()
    encode = sample_encoder(config, make_tokenizer(config), training_row_shape(config))
    of_model = args.view != "pictures"

    def prepared(record: Sample | Sheet) -> list[tuple[Sample, Example | None]]:
        return [(sample, encode(sample) if of_model else None) for sample in samples_of(record)]

    usable = (pair for source in sources.values() for pairs in _usable(source, None, skips, prepared) for pair in pairs)
    pairs = list(itertools.islice(usable, count))
    if not pairs:
        raise RequestError(
            f"data: none of {skips.tried} samples can be used ({skips.by_reason()}); see visor data check"
        )
    encoded = [(sample, example) for sample, example in pairs if example is not None]
    if of_model:
        title, examples = _first_step(config, args.split, encode) or ("rows filled from the samples above", [])
        missing = model_sheet(encoded, examples or [example for _, example in encoded], title, config, out)
    else:
        missing = contact_sheet([sample for sample, _ in pairs], out)
    print(f"{out}: {len(pairs)} samples, {skips.skipped} skipped")
    if missing:
        print(f"{len(missing)} characters are shown by name or number, because no installed font has them")
    return {"out": str(out), "samples": len(pairs), "skipped": skips.by_reason()}


def _first_step(
    config: Config, split: str, encode: Callable[[Sample | Sheet], Example]
) -> tuple[str, list[Example]] | None:
    """Returns a title and the samples from which the rows of the first step on answers are filled.

    None if another split is drawn, if no configured stage trains on answers, or if its data cannot be used.
    """
    stages = [stage for stage in config.stages if stage in TRAINED_STAGES]
    stage = next((stage for stage in stages if stage_config(config, stage).objective == "answer"), None)
    if stage is None or split not in ("", "train"):
        return None
    from visor_jax.data.pipeline import ExampleStream
    from visor_jax.train.stage import stage_seed

    num_rows, data = stage_config(config, stage).batch_size, config.data
    num_pools = num_rows // data.pool_rows
    title, places = f"first rows of step 1 of stage {stage}", range(min(num_rows, UNPACKED_ROWS))
    if data.pack_window:
        title = f"rows of step 1 of stage {stage}, pool 1 of {num_pools}"
        places = range(0, data.pack_window * num_pools, num_pools)  # what the first pool reads
    try:
        parts = stage_parts(config, stage)
        stream = ExampleStream(parts, encode, stage_seed(config.seed, stage), stage_phases(config, stage, parts))
        return title, [stream[place] for place in places]
    except (RequestError, RunError) as error:
        _log.warning("training could not begin, so the rows are filled from the samples drawn: %s", error)
        return None
