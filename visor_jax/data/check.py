"""`visor data check`: sends every record through the whole pipeline, without training.

In: a configuration and its sources. Out: counts by reason and source, printed and as an object; with a listing, one
JSON object per line about every record. If training would stop (too many records are skipped, or a split that a stage
reads has no usable sample), `RunError` is raised with the object. What is unusual but trained on is only reported:
duplicates, answers that occur in their questions, samples without pictures.

`visor_jax.data.check_records` checks single records, `visor_jax.data.check_progress` runs through all of them.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from visor_jax.config import Config, ConfigLike, as_config
from visor_jax.data.check_progress import Progress, check_ranges
from visor_jax.data.check_records import FIRST, NO_KEY, Entry, Findings, Named, RecordChecker, repeated
from visor_jax.data.sample import Source
from visor_jax.data.source_kind import SPLITS, RecordSource, as_records, split_read_by
from visor_jax.data.sources import source_kind
from visor_jax.errors import RunError, printable, unwritable
from visor_jax.files.read_write import file_beside, replaceable

_DETAIL_CHARACTERS = 300  # printed of a record's defect; the listing has all of it
_ID_CHARACTERS = 80  # printed of an id


@dataclass(frozen=True)
class Running:
    """How a check runs: with how many processes, what it writes about every record, whether it begins again.

    Attributes:
      workers: processes; 0 checks in this one.
      listing: the file for one line per record; None writes none.
      restart: whether the progress of a check that was killed is dropped.
    """

    workers: int = 0
    listing: str | None = None
    restart: bool = False


@dataclass
class _Checked:
    """What was found in one source, and which records repeat others."""

    findings: Findings = field(default_factory=Findings)
    same_id: Named = field(default_factory=Named)
    same_content: Named = field(default_factory=Named)


def check(
    config: ConfigLike,
    sources: Mapping[str, Source],
    limit: int | None,
    *,
    whole: bool,
    running: Running = Running(),
) -> dict[str, Any]:
    """Checks at most `limit` samples of each source and prints the counts.

    Args:
      config: the configuration of the training.
      sources: by split, or the whole file under "all".
      limit: samples per source; None for all.
      whole: whether `sources` are all that the configuration reads; then a missing split is a problem.
      running: workers, listing, restart.

    Returns:
      {"samples", "usable", "without_picture", "skipped": {reason: n}, "within_limit", "first": {reason: detail},
      "splits": {name: {the first four, "first_ids": {reason: [ids]}, "too_large": {field: {"samples", "largest"}},
      "duplicate_ids", "duplicates", "answers_in_questions", "sources": {name: {"samples", "usable", "skipped",
      "first_ids"}}}}, "problems": [text], "shared_with_training": {split: n}}. A mixture has several sources.
      "first_ids" has the first ids of what is counted under the same name.

    Raises:
      RunError: training would stop, or a worker died; in the first case its `result` is the same object.
      RequestError: the listing cannot be written.
    """
    config = as_config(config)
    records = {name: as_records(source, name) for name, source in sources.items()}
    checked: dict[str, _Checked] = {}
    splits: dict[str, Any] = {}
    begun: list[Progress] = []
    with _lines(running.listing) as write:
        for name, source in records.items():
            checker = RecordChecker(config, name, source, listing=running.listing is not None)
            count = min(len(source), limit or len(source))
            begun.append(Progress.of(checker, count, restart=running.restart))
            checked[name] = _check_source(checker, count, running.workers, begun[-1], write)
            splits[name] = _facts(checked[name])
            _print_split(name if name == source.name else f"{source.name} {name}", splits[name])
    for progress in begun:
        progress.remove()
    shared = _shared_with_training(records, checked)
    for split, count in shared.items():
        print(f"split {split!r}: {count} samples have the pictures and questions of a training sample (kept)")
    result = _summary(config, splits, [of_source.findings for of_source in checked.values()])
    result["shared_with_training"] = shared
    found = {name: of_source.findings for name, of_source in checked.items()}
    result["problems"] += _problems(config, records, found, complete=limit is None) if whole else []
    _print_summary(config, result)
    if result["problems"]:
        more = f" (and {len(result['problems']) - 1} more)" if len(result["problems"]) > 1 else ""
        raise RunError(f"data check: training would stop: {result['problems'][0]}{more}", result)
    return result


def _check_source(
    checker: RecordChecker, count: int, workers: int, progress: Progress, write: Callable[[Entry], None]
) -> _Checked:
    """Checks the first `count` samples of a source and writes an entry for each."""
    checked = _Checked()
    with contextlib.closing(check_ranges(checker, count, workers, progress)) as ranges:
        for findings in ranges:
            for entry in findings.entries:
                write(entry)
            checked.findings.add(findings)
    checked.same_id = _repetitions(checked.findings.ids, checker.source)
    checked.same_content = _repetitions(checked.findings.contents, checker.source)
    return checked


def _repetitions(keys: Sequence[int], source: RecordSource) -> Named:
    """Returns how many records repeat the key of an earlier one; both are named, "second = first"."""
    pairs = repeated([*keys])
    return Named(len(pairs), [f"{source.place(again)} = {source.place(first)}" for again, first in pairs[:FIRST]])


def _shared_with_training(records: Mapping[str, RecordSource], checked: Mapping[str, _Checked]) -> dict[str, int]:
    """Returns split -> how many of its samples have the pictures and questions of a training sample; only if some."""
    contents: dict[str, list[int]] = {split: [] for split in SPLITS}
    for name, source in records.items():
        keys = checked[name].findings.contents
        if name in SPLITS:
            contents[name] += keys
            continue
        # Records that are in every split are meant to be; only repetitions may be shared by accident.
        for position in sorted({position for pair in repeated(keys) for position in pair}):
            splits = source.splits_of(position)
            if len(splits) == 1:
                contents[splits[0]].append(keys[position])
    training = {*contents["train"]} - {NO_KEY}
    counts = {split: sum(key in training for key in contents[split]) for split in SPLITS[1:]}
    return {split: count for split, count in counts.items() if count}


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


# --- counts -----------------------------------------------------------------------------------------------------------


def _facts(checked: _Checked) -> dict[str, Any]:
    """Returns the counts of one source, as in `check`'s "splits"."""
    findings = checked.findings
    skipped = findings.skipped
    unusual = {
        "duplicate_ids": checked.same_id,
        "duplicates": checked.same_content,
        "answers_in_questions": findings.leaks,
    }
    return {
        "samples": findings.samples,
        "usable": findings.samples - sum(named.count for named in skipped.values()),
        "without_picture": findings.without_picture,
        "skipped": _counts(skipped),
        "first_ids": _first_ids({**skipped, **unusual}),
        "too_large": {name: {"samples": n, "largest": most} for name, (n, most) in findings.too_large.items()},
        **_counts(unusual),
        "sources": {
            name: {
                "samples": of_source.samples,
                "usable": of_source.usable,
                "skipped": _counts(of_source.skipped),
                "first_ids": _first_ids(of_source.skipped),
            }
            for name, of_source in findings.sources.items()
        },
    }


def _counts(named: Mapping[str, Named]) -> dict[str, int]:
    return {name: of_name.count for name, of_name in named.items()}


def _first_ids(named: Mapping[str, Named]) -> dict[str, list[str]]:
    return {name: of_name.first for name, of_name in named.items() if of_name.count}


def _summary(config: Config, splits: Mapping[str, Any], found: Sequence[Findings]) -> dict[str, Any]:
    """Returns the sums over all sources; "problems" holds only that too many samples are skipped."""
    reasons: Counter[str] = sum((Counter(facts["skipped"]) for facts in splits.values()), Counter())
    samples, skipped = sum(findings.samples for findings in found), reasons.total()
    allowed = config.data.max_skipped_fraction
    within = skipped <= allowed * samples
    problem = f"{skipped} of {samples} samples are skipped, more than data.max_skipped_fraction={allowed:g}"
    return {
        "samples": samples,
        "usable": samples - skipped,
        "without_picture": sum(findings.without_picture for findings in found),
        "skipped": dict(reasons.most_common()),
        "within_limit": within,
        "first": {r: named.detail for findings in reversed(found) for r, named in findings.skipped.items()},
        "splits": dict(splits),
        "problems": [] if within else [problem],
    }


_UNUSUAL = {
    "without_picture": "of the usable samples have no picture (text only)",
    "duplicate_ids": "repeat the id of an earlier record (kept)",
    "duplicates": "of the usable samples have the pictures and questions of an earlier one (kept)",
    "answers_in_questions": "of the usable samples have an answer that occurs in its question (kept)",
}


def _print_split(name: str, facts: dict[str, Any]) -> None:
    print(f"{printable(name)}: {facts['samples']} samples")
    for reason, count in [("usable", facts["usable"]), *facts["skipped"].items()]:
        print(f"  {count:>9}  {reason}{_named(facts['first_ids'].get(reason, []), count)}")
        for limit, exceeding in facts["too_large"].items() if reason == "too_long" else ():
            print(f"             {exceeding['samples']} exceed {limit}; {limit}={exceeding['largest']} holds them all")
    for unusual, what in _UNUSUAL.items():
        if facts[unusual]:
            print(f"  {facts[unusual]:>9}  {what}{_named(facts['first_ids'].get(unusual, []), facts[unusual])}")
    for source, of_source in facts["sources"].items() if len(facts["sources"]) > 1 else ():
        print(f"  {of_source['samples']:>9}  of {printable(source)}, {of_source['usable']} usable")
        for reason, count in of_source["skipped"].items():
            print(f"             {count} {reason}{_named(of_source['first_ids'][reason], count)}")


def _named(ids: Sequence[str], count: int) -> str:
    """Returns the first ids, for the end of a line."""
    shown = [printable(id if len(id) <= _ID_CHARACTERS else f"{id[:_ID_CHARACTERS]}...") for id in ids]
    return f": {', '.join(shown)}{', ...' if count > len(shown) else ''}" if shown else ""


def _print_summary(config: Config, result: Mapping[str, Any]) -> None:
    for reason, detail in result["first"].items():
        print(f"first {reason}: {printable(detail[:_DETAIL_CHARACTERS])}")
    for problem in result["problems"]:
        print(f"training would stop: {problem}")
    skipped = result["samples"] - result["usable"]
    print(
        f"{result['usable']} of {result['samples']} samples can be used; {skipped} are skipped, "
        f"{'within' if result['within_limit'] else 'MORE than'} "
        f"data.max_skipped_fraction={config.data.max_skipped_fraction:g}"
    )


# --- where training would stop ----------------------------------------------------------------------------------------


def _problems(
    config: Config, sources: Mapping[str, RecordSource], found: Mapping[str, Findings], *, complete: bool
) -> list[str]:
    """Returns the defects of the splits that the configured stages and the evaluation after them read.

    Without `complete` (not all samples were tried) only missing and empty splits are reported.
    """
    kind = source_kind(config)
    if kind.endless:
        return []
    tried = sum((findings.tried for findings in found.values()), Counter())
    usable = sum((findings.usable for findings in found.values()), Counter())
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
    mixtures = [findings.sources for findings in found.values() if len(findings.sources) > 1]
    problems += [
        f"{name} has no usable record"
        for of_mixture in mixtures
        for name, of_source in of_mixture.items()
        if not of_source.usable
    ]
    skipped, allowed = tried["train"] - usable["train"], config.data.max_skipped_fraction
    if skipped > allowed * tried["train"] and usable["train"]:
        problems.append(f"{skipped} of the {tried['train']} training samples are skipped")
    return problems
