"""Refuses a tokenizer.json whose parts could make a short text cost minutes or gigabytes.

Imports no JAX. In: the parsed file. Out: nothing, or a `RequestError` that names the part. The parts of Qwen2, GPT-2
and Llama 3 are supported: byte-level BPE, Unicode normalization, replacements, splitting by patterns. Two quantities
are bounded: how much normalizers, pre-tokenizers and decoders can lengthen a text, and how much a pattern can
backtrack.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from visor_jax.errors import RequestError, nearest

# Kind -> factor by which it can lengthen a text, in characters; 0: `_factor` computes it. A Sequence holds others.
NORMALIZERS = {
    "NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Lowercase": 2, "StripAccents": 1, "Strip": 1, "Nmt": 1,
    "BertNormalizer": 3, "ByteLevel": 4, "Prepend": 0, "Replace": 0,
}  # fmt: skip
PRE_TOKENIZERS = {
    "ByteLevel": 4, "Split": 1, "Digits": 1, "Punctuation": 1, "Whitespace": 1, "WhitespaceSplit": 1, "Metaspace": 2,
    "BertPreTokenizer": 1, "CharDelimiterSplit": 1, "UnicodeScripts": 1,
}  # fmt: skip
POST_PROCESSORS = {"ByteLevel": 1, "TemplateProcessing": 1, "RobertaProcessing": 1, "BertProcessing": 1}
DECODERS = {
    "ByteLevel": 1, "ByteFallback": 1, "BPEDecoder": 1, "Fuse": 1, "Metaspace": 1, "Strip": 1, "WordPiece": 2,
    "Replace": 0,
}  # fmt: skip
PARTS = {  # name -> kinds, and the field that lists the members of its Sequence
    "normalizer": (NORMALIZERS, "normalizers"),
    "pre_tokenizer": (PRE_TOKENIZERS, "pretokenizers"),
    "post_processor": (POST_PROCESSORS, "processors"),
    "decoder": (DECODERS, "decoders"),
}
MAX_GROWTH, MAX_STEPS, MAX_DEPTH = 256, 32, 8  # Qwen2: 12, 2, 2
MAX_ADDED_TOKENS, MAX_PATTERN = 20_000, 2000
MAX_OPEN_REPEATS, MAX_CHOICES = 2, 256  # per branch of a pattern; Qwen2: 2 and 2


def check_parts(content: Mapping[str, Any], name: str) -> None:
    """Checks that all parts of a tokenizer.json are of a known kind and cheap to run.

    Args:
      content: the parsed file.
      name: names the file in errors.

    Raises:
      RequestError: a part is not; the message names the first one.
    """
    model = content.get("model")
    kind = model.get("type", "BPE") if isinstance(model, Mapping) else None
    if kind != "BPE":
        raise RequestError(f"{name}: model.type={kind!r}: expected 'BPE', as in Qwen2's tokenizer")
    if isinstance(model, Mapping) and model.get("dropout"):
        raise RequestError(f"{name}: model.dropout={model['dropout']!r}: expected none: a text has one encoding")
    added = content.get("added_tokens")
    if isinstance(added, list) and len(added) > MAX_ADDED_TOKENS:
        raise RequestError(f"{name}: {len(added):,} added_tokens; expected at most {MAX_ADDED_TOKENS:,}")
    growth = 1
    for part, (kinds, inner) in PARTS.items():
        steps = list(_steps(content.get(part), inner, f"{name}: {part}"))
        if len(steps) > MAX_STEPS:
            raise RequestError(f"{name}: {part}: {len(steps)} steps; expected at most {MAX_STEPS}")
        growth = growth if part in ("pre_tokenizer", "post_processor") else 1  # decoding starts from a new text
        for step in steps:
            growth *= _factor(step, kinds, f"{name}: {part}")
            if growth > MAX_GROWTH:
                raise RequestError(
                    f"{name}: {part}: its steps can make a text {growth} times as long; expected at most {MAX_GROWTH}"
                )


def _steps(part: Any, inner: str, where: str, depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """Yields the steps of a part; flattens sequences."""
    if part is None:
        return
    if not isinstance(part, Mapping) or depth > MAX_DEPTH:
        raise RequestError(f"{where}: expected an object with a type, nested at most {MAX_DEPTH} deep")
    if part.get("type") != "Sequence":
        yield part
        return
    members = part.get(inner)
    if not isinstance(members, list) or len(members) > MAX_STEPS:
        raise RequestError(f"{where}: {inner}: expected a list of at most {MAX_STEPS}")
    for member in members:
        yield from _steps(member, inner, where, depth + 1)


def _factor(step: Mapping[str, Any], kinds: Mapping[str, int], where: str) -> int:
    """Returns the factor by which a step can lengthen a text; also checks its pattern."""
    kind = step.get("type")
    if not isinstance(kind, str) or kind not in kinds:
        hint = nearest(kind, kinds) if isinstance(kind, str) and len(kind) < 40 else ""
        raise RequestError(f"{where}: type={str(kind)[:40]!r}: expected one of {', '.join(kinds)}; {hint}".rstrip("; "))
    pattern = step.get("pattern")
    expression = pattern.get("Regex") if isinstance(pattern, Mapping) else None
    if expression is not None:
        check_pattern(expression, where)
    if kind == "Prepend":
        return 1 + len(str(step.get("prepend", "")))
    if kind == "Replace":
        literal = pattern.get("String") if isinstance(pattern, Mapping) else None
        content = len(str(step.get("content", "")))
        return max(1, -(-content // len(literal))) if isinstance(literal, str) and literal else 1 + content
    return kinds[kind]


# --- patterns ---------------------------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"""(?P<escape>\\(?:[pP]\{\^?\w+\}|[xu]\{[0-9a-fA-F]+\}|.))
    |(?P<class>\[\^?\]?)
    |(?P<open>\((?:\?(?:[imsx-]*:|[=!>]|<[=!]))?)
    |(?P<close>\))
    |(?P<bar>\|)
    |(?P<repeat>[*+?]|\{\d*,?\d*\})
    |(?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)


@dataclass
class _Branch:
    """The alternatives in one branch of a group: open-ended repeats, and the product of all other choices."""

    open_repeats: int = 0
    choices: int = 1


def check_pattern(pattern: Any, where: str) -> None:
    """Checks that the time to match a regular expression does not explode with the length of the text.

    Repeats must not be nested and alternatives must not be repeated. A branch may hold at most `MAX_OPEN_REPEATS`
    open-ended repeats and `MAX_CHOICES` ways through its bounded ones. Back-references, names, conditions and calls
    are not supported.

    Raises:
      RequestError: the pattern breaks one of these rules.
    """
    short = repr(pattern)[:60]

    def refuse(why: str) -> RequestError:
        return RequestError(f"{where}: pattern {short}: {why}; expected one as Qwen2's or GPT-2's")

    if not isinstance(pattern, str) or len(pattern) > MAX_PATTERN:
        raise refuse(f"longer than {MAX_PATTERN} characters, or not text")
    stack: list[list[_Branch]] = [[_Branch()]]  # the branches of each open group
    last: list[_Branch] = []  # branches of the item that a repeat would apply to; empty for a single character
    position = 0
    while position < len(pattern):
        match = _TOKEN.match(pattern, position)
        assert match is not None  # the last alternative matches any character
        kind, text, position = match.lastgroup, match[0], match.end()
        if kind == "escape" and re.fullmatch(r"\\[1-9kgKGXR]", text):
            raise refuse("back-references, calls and multi-character escapes are not supported")
        if kind == "class":
            position, last = _class_end(pattern, match.start(), refuse), []
        elif kind == "open":
            if text == "(" and pattern.startswith("?", position):
                raise refuse("names, conditions, calls and comments are not supported")
            stack.append([_Branch()])
        elif kind == "bar":
            stack[-1].append(_Branch())
        elif kind == "close":
            if len(stack) == 1:
                raise refuse("its parentheses do not match")
            last = stack.pop()
            outer = stack[-1][-1]
            outer.open_repeats += max(branch.open_repeats for branch in last)
            outer.choices *= sum(branch.choices for branch in last)
        elif kind == "repeat":
            _repeat(text, last, stack[-1][-1], refuse)
            suffixes = "?" if text.startswith("{") else "?+"  # lazy or possessive; `{1,2}+` repeats the repeat
            if position < len(pattern) and pattern[position] in suffixes:
                position += 1
            last = [_Branch(), _Branch()]  # a repeat of a repeat counts as a repeated group
        else:
            last = []
        if any(b.open_repeats > MAX_OPEN_REPEATS or b.choices > MAX_CHOICES for b in stack[-1]):
            raise refuse("too many repeats in a row")
    if len(stack) > 1:
        raise refuse("its parentheses do not match")


def _repeat(text: str, repeated: list[_Branch], branch: _Branch, refuse: Callable[[str], RequestError]) -> None:
    """Adds a repeat to the counts of its branch."""
    low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(text, (0, 0))
    if text.startswith("{"):
        bounds = text[1:-1].split(",")
        if bounds == [""] or any(len(bound) > 4 for bound in bounds):
            raise refuse(f"{text} is not a repeat of at most 9999")
        low = int(bounds[0] or 0)
        high = int(bounds[1]) if len(bounds) > 1 and bounds[1] else (None if len(bounds) > 1 else low)
    several = high is None or high > 1
    if several and (len(repeated) > 1 or any(part.open_repeats or part.choices > 1 for part in repeated)):
        raise refuse("repeats of alternatives or of repeats")
    if high is None:
        branch.open_repeats += 1
    else:
        branch.choices *= max(1, high - low + 1)


def _class_end(pattern: str, start: int, refuse: Callable[[str], RequestError]) -> int:
    """Returns the position after a character class; nested classes are allowed."""
    depth, position = 0, start
    while position < len(pattern):
        character = pattern[position]
        if character == "\\":
            position += 1
        elif character == "[":
            depth += 1
            opening = re.compile(r"\^?\]?").match(pattern, position + 1)
            position += len(opening[0]) if opening else 0  # a leading bracket is a plain character
        elif character == "]":
            depth -= 1
            if depth == 0:
                return position + 1
        position += 1
    raise refuse("its brackets do not match")
