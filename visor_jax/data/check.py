"""`visor data check`: sends every record through the whole pipeline, without training.

In: a configuration and its sources. Out: counts by reason, printed and as an object; with a listing, one JSON object
per line about every record. If training would stop (too many records are skipped, or a split that a stage reads has no
usable sample), `RunError` is raised with the object.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from visor_jax.config import Config, ConfigLike, as_config
from visor_jax.data.collate import Example
from visor_jax.data.from_config import make_tokenizer, sample_encoder, training_row_shape
from visor_jax.data.sample import Sample, SkipSample, Source
from visor_jax.data.skips import SkipLog
from visor_jax.data.source_kind import SPLITS, RecordSource, as_records, split_read_by
from visor_jax.data.sources import source_kind
from visor_jax.errors import RunError, printable, unwritable
from visor_jax.files.read_write import file_beside, replaceable

Entry = dict[str, Any]
_DETAIL_CHARACTERS = 300  # printed of a record's defect; the listing has all of it


@dataclass
class _Counts:
    """Counts of one source; `tried` and `usable` by split, as a file may hold several."""

    skips: SkipLog = field(default_factory=SkipLog)
    without_picture: int = 0
    tried: Counter[str] = field(default_factory=Counter)
    usable: Counter[str] = field(default_factory=Counter)


def check(
    config: ConfigLike, sources: Mapping[str, Source], limit: int | None, *, whole: bool, listing: str | None = None
) -> dict[str, Any]:
    """Checks at most `limit` samples of each source and prints the counts.

    Args:
      config: the configuration of the training.
      sources: by split, or the whole file under "all".
      limit: samples per source; None for all.
      whole: whether `sources` are all that the configuration reads; then a missing split is a problem.
      listing: the file for one line per record; None writes none.

    Returns:
      {"samples", "usable", "without_picture", "skipped": {reason: n}, "within_limit", "first": {reason: detail},
      "splits": {name: the first four and "duplicate_ids"}, "problems": [text]}.

    Raises:
      RunError: training would stop; its `result` is the same object.
      RequestError: the listing cannot be written.
    """
    config = as_config(config)
    encode = sample_encoder(config, make_tokenizer(config), training_row_shape(config))
    records = {name: as_records(source, name) for name, source in sources.items()}
    counts: dict[str, _Counts] = {}
    splits: dict[str, Any] = {}
    with _lines(listing) as write:
        for name, source in records.items():
            counts[name] = _check_source(name, source, limit, encode, write)
            splits[name] = _facts(source, counts[name])
            _print_split(name if name == source.name else f"{source.name} {name}", splits[name])
    reasons: Counter[str] = sum((Counter(facts["skipped"]) for facts in splits.values()), Counter())
    logs = [of_source.skips for of_source in counts.values()]
    first = {reason: detail for log in reversed(logs) for reason, detail in log.first.items()}
    for reason, detail in first.items():
        print(f"first {reason}: {printable(detail[:_DETAIL_CHARACTERS])}")
    tried, skipped = sum(log.tried for log in logs), reasons.total()
    allowed = config.data.max_skipped_fraction
    problems = _problems(config, records, counts, complete=limit is None) if whole else []
    within = skipped <= allowed * tried
    if not within:
        problems.insert(0, f"{skipped} of {tried} samples are skipped, more than data.max_skipped_fraction={allowed:g}")
    for problem in problems:
        print(f"training would stop: {problem}")
    print(
        f"{tried - skipped} of {tried} samples can be used; {skipped} are skipped, "
        f"{'within' if within else 'MORE than'} data.max_skipped_fraction={allowed:g}"
    )
    result = {
        "samples": tried,
        "usable": tried - skipped,
        "without_picture": sum(of_source.without_picture for of_source in counts.values()),
        "skipped": dict(reasons.most_common()),
        "within_limit": within,
        "first": first,
        "splits": splits,
        "problems": problems,
    }
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise RunError(f"data check: training would stop: {problems[0]}{more}", result)
    return result


def _check_source(
    name: str,
    source: RecordSource,
    limit: int | None,
    encode: Callable[[Sample], Example],
    write: Callable[[Entry], None],
) -> _Counts:
    """Tries at most `limit` samples of a source and writes an entry for each."""
    counts = _Counts()
    for index in range(min(len(source), limit or len(source))):
        splits = (name,) if name in SPLITS else source.splits_of(index)
        counts.skips.count_tried()
        counts.tried.update(splits)
        try:
            sample = source[index]
            example = _encoded(encode, sample, source, index)
        except SkipSample as why:
            counts.skips.count_skipped(source.name, index, why)
            write(_entry(source, index, why))
        else:
            counts.usable.update(splits)
            counts.without_picture += not sample.images
            write(_entry(source, index, (sample, example)))
    return counts


def _encoded(encode: Callable[[Sample], Example], sample: Sample, source: RecordSource, index: int) -> Example:
    """Encodes a sample; names its place in the details of `SkipSample`."""
    try:
        return encode(sample)
    except SkipSample as why:
        raise SkipSample(why.reason, f"{source.place(index)}: {why.detail}") from None


def _entry(source: RecordSource, index: int, outcome: SkipSample | tuple[Sample, Example]) -> Entry:
    """Returns the listing's entry of a record; lengths are known only if it can be used."""
    id, pictures = source.record_facts(index)
    entry: Entry = {
        "place": source.place(index),
        "id": id,
        "usable": True,
        "reason": "",
        "detail": "",
        "pictures": pictures,
    }
    if isinstance(outcome, SkipSample):
        return {
            **entry,
            "usable": False,
            "reason": outcome.reason,
            "detail": outcome.detail,
            "visual_tokens": None,
            "text_tokens": None,
        }
    sample, example = outcome
    sizes = {"visual_tokens": example.size.visual, "text_tokens": example.size.text}
    return {**entry, "id": sample.id, "pictures": len(sample.images), **sizes}


@contextlib.contextmanager
def _lines(listing: str | None) -> Iterator[Callable[[Entry], None]]:
    """Yields a function that writes one object per line; the file appears when all are written."""
    if listing is None:
        yield lambda entry: None
        return
    try:
        with file_beside(replaceable(listing)) as file:

            def write(entry: Entry) -> None:
                file.write(f"{json.dumps(entry)}\n".encode())

            yield write
    except OSError as error:
        raise unwritable(f"--list={listing}", error) from error


def _facts(source: RecordSource, counts: _Counts) -> dict[str, Any]:
    """Returns the counts of one source, as in `check`'s "splits"."""
    skipped = Counter({reason: count for (_, reason), count in counts.skips.counts.most_common()})
    return {
        "samples": counts.skips.tried,
        "usable": counts.skips.tried - skipped.total(),
        "without_picture": counts.without_picture,
        "skipped": dict(skipped),
        "duplicate_ids": source.duplicate_ids(),
    }


def _print_split(name: str, facts: dict[str, Any]) -> None:
    print(f"{name}: {facts['samples']} samples")
    for reason, count in [("usable", facts["usable"]), *facts["skipped"].items()]:
        print(f"  {count:>9}  {reason}")
    if facts["without_picture"]:
        print(f"  {facts['without_picture']:>9}  of the usable samples have no picture (text only)")
    if facts["duplicate_ids"]:
        print(f"  {facts['duplicate_ids']:>9}  repeat the id of an earlier record (kept)")


# --- where training would stop ----------------------------------------------------------------------------------------


def _problems(
    config: Config, sources: Mapping[str, RecordSource], counts: Mapping[str, _Counts], *, complete: bool
) -> list[str]:
    """Returns the defects of the splits that the configured stages and the evaluation after them read.

    Without `complete` (not all samples were tried) only missing and empty splits are reported.
    """
    kind = source_kind(config)
    if kind.endless:
        return []
    tried = sum((of_source.tried for of_source in counts.values()), Counter())
    usable = sum((of_source.usable for of_source in counts.values()), Counter())
    read = [split for split in SPLITS if split in {*map(split_read_by, config.stages), "test"}]
    if sources.keys() <= {*SPLITS}:
        files = kind.split_files(config)
        missing = [split for split in read if split not in sources]
        problems = [f"split {split!r}: no file {files.get(split, '')}" for split in missing]
        read = [split for split in read if split in sources]
    else:
        source = next(iter(sources.values()))
        members = Counter(split for index in range(len(source)) for split in source.splits_of(index))
        if config.data.test_fraction:
            print("splits: " + ", ".join(f"{split} {members[split]}" for split in SPLITS))
        empty = [split for split in read if not members[split]]
        problems = [str(source.empty_split(*empty))] if empty else []
        read = [split for split in read if members[split]]
    if not complete:
        return problems
    problems += [f"split {split!r} has no usable sample" for split in read if not usable[split]]
    skipped, allowed = tried["train"] - usable["train"], config.data.max_skipped_fraction
    if skipped > allowed * tried["train"] and usable["train"]:
        problems.append(f"{skipped} of the {tried['train']} training samples are skipped")
    return problems
