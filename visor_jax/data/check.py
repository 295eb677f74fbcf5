"""`visor data check`: every record through the whole pipeline, without training.

In: a configuration and its sources. Out: counts by reason, printed and as an object; with a listing, one JSON object a
line about every record. Where training would stop (too many records skipped, a split that a stage reads without any
usable sample) the object comes with a `RunError`.
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
from visor_jax.data.source_kind import SPLITS, RecordSource, split_read_by
from visor_jax.data.sources import source_kind
from visor_jax.errors import RunError, printable, unwritable
from visor_jax.files.read_write import file_beside, replaceable

Entry = dict[str, Any]
_DETAIL_CHARACTERS = 300  # printed of what is wrong with a record; the listing has all of it


@dataclass
class _Found:
    """What was found in one source, by split where a file holds several."""

    skips: SkipLog = field(default_factory=SkipLog)
    without_picture: int = 0
    tried: Counter[str] = field(default_factory=Counter)
    usable: Counter[str] = field(default_factory=Counter)


def check(
    config: ConfigLike, sources: Mapping[str, Source], limit: int | None, *, whole: bool, listing: str | None = None
) -> dict[str, Any]:
    """Checks at most `limit` samples of each source, and prints what was found.

    Args:
      config: the configuration that training would have.
      sources: by split, or the whole file under "all".
      whole: whether all that the configuration reads was asked for, so that a missing split is told.
      listing: the file to write about every record to.

    Returns:
      {"samples", "usable", "without_picture", "skipped": {reason: n}, "within_limit", "first": {reason: detail},
      "splits": {name: the first four and "duplicate_ids"}, "problems": [text]}.

    Raises:
      RunError: training would stop; its `result` is the same object.
      RequestError: the listing cannot be written.
    """
    config = as_config(config)
    encode = sample_encoder(config, make_tokenizer(config), training_row_shape(config))
    found: dict[str, _Found] = {}
    splits: dict[str, Any] = {}
    with _lines(listing) as write:
        for name, source in sources.items():
            found[name] = _check_source(name, source, limit, encode, write)
            splits[name] = _facts(source, found[name])
            _print_split(name if name == source.name else f"{source.name} {name}", splits[name])
    reasons: Counter[str] = sum((Counter(facts["skipped"]) for facts in splits.values()), Counter())
    first = {reason: detail for one in reversed(found.values()) for reason, detail in one.skips.first.items()}
    for reason, detail in first.items():
        print(f"first {reason}: {printable(detail[:_DETAIL_CHARACTERS])}")
    tried, skipped = sum(one.skips.tried for one in found.values()), reasons.total()
    allowed = config.data.max_skipped_fraction
    problems = _problems(config, sources, found, complete=whole and limit is None) if whole else []
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
        "without_picture": sum(one.without_picture for one in found.values()),
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
    name: str, source: Source, limit: int | None, encode: Callable[[Sample], Example], write: Callable[[Entry], None]
) -> _Found:
    found = _Found()
    for index in range(min(len(source), limit or len(source))):
        belongs = source.splits_of(index) if isinstance(source, RecordSource) and name not in SPLITS else (name,)
        found.skips.count_tried()
        found.tried.update(belongs)
        try:
            sample = source[index]
            example = _encoded(encode, sample, source, index)
        except SkipSample as why:
            found.skips.count_skipped(source.name, index, why)
            write(_entry(source, index, why))
        else:
            found.usable.update(belongs)
            found.without_picture += not sample.images
            write(_entry(source, index, (sample, example)))
    return found


def _encoded(encode: Callable[[Sample], Example], sample: Sample, source: Source, index: int) -> Example:
    try:
        return encode(sample)
    except SkipSample as why:
        raise SkipSample(why.reason, f"{_place(source, index)}: {why.detail}") from None


def _place(source: Source, index: int) -> str:
    return source.place(index) if isinstance(source, RecordSource) else f"{source.name}[{index}]"


def _entry(source: Source, index: int, outcome: SkipSample | tuple[Sample, Example]) -> Entry:
    """What the listing says of one record. Without a reason it can be used; lengths are known only then."""
    id, pictures = source.record_facts(index) if isinstance(source, RecordSource) else (None, None)
    entry: Entry = {
        "place": _place(source, index),
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
    """A function that writes one object a line; the file appears when all are written."""
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


def _facts(source: Source, found: _Found) -> dict[str, Any]:
    skipped = Counter({reason: count for (_, reason), count in found.skips.counts.most_common()})
    return {
        "samples": found.skips.tried,
        "usable": found.skips.tried - skipped.total(),
        "without_picture": found.without_picture,
        "skipped": dict(skipped),
        "duplicate_ids": source.duplicate_ids() if isinstance(source, RecordSource) else 0,
    }


def _print_split(name: str, facts: dict[str, Any]) -> None:
    print(f"{name}: {facts['samples']} samples")
    for reason, count in [("usable", facts["usable"]), *facts["skipped"].items()]:
        print(f"  {count:>9}  {reason}")
    if facts["without_picture"]:
        print(f"  {facts['without_picture']:>9}  of the usable have no picture (text only)")
    if facts["duplicate_ids"]:
        print(f"  {facts['duplicate_ids']:>9}  have an id that an earlier one has too (kept)")


# --- where training would stop ----------------------------------------------------------------------------------------


def _problems(
    config: Config, sources: Mapping[str, Source], found: Mapping[str, _Found], *, complete: bool
) -> list[str]:
    """What is wrong with the splits that the configured stages and the evaluation after them read."""
    kind = source_kind(config)
    if kind.endless:
        return []
    tried = sum((one.tried for one in found.values()), Counter())
    usable = sum((one.usable for one in found.values()), Counter())
    read = [split for split in SPLITS if split in {*map(split_read_by, config.stages), "test"}]
    files, whole = kind.split_files(config), [one for one in sources.values() if isinstance(one, RecordSource)]
    if files or not whole:
        missing = [split for split in read if split not in sources]
        problems = [f"split {split!r}: no file {files.get(split, '')}" for split in missing]
        read = [split for split in read if split in sources]
    else:
        source = whole[0]
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
