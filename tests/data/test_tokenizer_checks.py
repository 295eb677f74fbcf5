"""Tokenizers that would hang, exhaust memory or panic are refused by their parts; those of real models are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from visor_jax.config.data_fields import ASSETS
from visor_jax.data.tokenizer import load_tokenizer
from visor_jax.data.tokenizer_checks import check_pattern
from visor_jax.errors import RequestError

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GOOD = [
    QWEN2,
    QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1),  # Llama 3
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{M}]*[\p{Ll}\p{M}]+(?i:'s|'t)?|\p{N}{1,3}| ?[^\s\p{L}]+[\r\n/]*",  # GPT-4o
    r"\s{2,}",
    r"[!-/:-@\[-`{-~][A-Za-z]+|[]a]|[^]a]|[a&&[b-]]",
    r"(?:a|b)?c(?<=c)(?<!d)",
]
BAD = [
    "(a+)+$", "(a|a)*b", "(?:a?){30}a{30}", "a?" * 30 + "a" * 30, "(a*)*", "(a{1,9}){1,9}", "a{1,9}+", "a*b*c*", "a**",
    r"(\w+\s?)*$", r"(a)\1", "(?<n>a)", "(?(1)a)", "(", "a)", "[a", "(?#x)", r"\g<0>", "((a|b)(a|b))*", "(?:(?:a+))+",
    "a{99999}", "a{}", "x" * 3000, 5, "(.*)(.*)(.*)x", "(?=a+)*", "(?i)a",
]  # fmt: skip


@pytest.mark.parametrize("pattern", GOOD)
def test_patterns_of_real_tokenizers_are_taken(pattern: str) -> None:
    check_pattern(pattern, "tokenizer.json: pre_tokenizer")


@pytest.mark.parametrize("pattern", BAD)
def test_patterns_that_may_backtrack_without_end_are_refused(pattern: Any) -> None:
    with pytest.raises(RequestError, match=r"here: pattern .*expected one as Qwen2's"):
        check_pattern(pattern, "here")


def sequence(inner: str, *members: Any) -> dict[str, Any]:
    return {"type": "Sequence", inner: list(members)}


def split(pattern: Any) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def nested(depth: int) -> dict[str, Any]:
    return {"type": "NFC"} if depth == 0 else sequence("normalizers", nested(depth - 1))


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 30}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "a normalizer that multiplies by 30, eight times": (
        {"normalizer": sequence("normalizers", *[REPLACE] * 8)},
        "normalizer: its steps can make a text 900 times as long; expected at most 256",
    ),
    "one replacement of a letter by a page": ({"normalizer": {**REPLACE, "content": "a" * 500}}, "500 times as long"),
    "a replacement of nothing": ({"normalizer": {**REPLACE, "pattern": {"String": ""}, "content": "a" * 999}}, "times"),
    "something put in front, often": (
        {"normalizer": sequence("normalizers", *[{"type": "Prepend", "prepend": "aaaa"}] * 8)},
        "times as long",
    ),
    "bytes of bytes": ({"pre_tokenizer": sequence("pretokenizers", *[BYTES] * 8)}, "pre_tokenizer: its steps can make"),
    "a decoder that multiplies": ({"decoder": sequence("decoders", *[REPLACE] * 8)}, "decoder: its steps can make"),
    "a catastrophic pattern": (
        {"pre_tokenizer": split("(a+)+$")},
        r"pattern '\(a\+\)\+\$': repeats of alternatives or",
    ),
    "a catastrophic pattern to replace": (
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a|aa)+$"}, "content": ""}},
        "normalizer: pattern",
    ),
    "a sequence of sequences": ({"normalizer": nested(50)}, "nested at most 8 deep"),
    "a long sequence": ({"normalizer": sequence("normalizers", *[{"type": "Strip"}] * 1000)}, "a list of at most 32"),
    "an unknown kind": ({"normalizer": {"type": "NFX"}}, "type='NFX': expected one of NFC"),
    "no kind": ({"decoder": {}}, "type='None': expected one of ByteLevel"),
    "a charsmap": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AA=="}}, "type='Precompiled'"),
    "a list for an object": ({"pre_tokenizer": [1]}, "pre_tokenizer: expected an object with a type"),
    "another model": ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "model.type='Unigram': expected 'BPE'"),
    "no model": ({"model": None}, "model.type=None: expected 'BPE'"),
    "a model that draws": ({"model.dropout": 0.5}, r"model.dropout=0\.5: expected none"),
    "too many added tokens": (
        {"more added": [{**ADDED, "id": 1000 + i, "content": f"<{i}>"} for i in range(20_001)]},
        "added_tokens; expected at most 20,000",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_tokenizer_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    changes, message = HOSTILE[case]
    content = json.loads(((ASSETS / "almanac") / "tokenizer.json").read_text())
    for name, value in changes.items():
        if name == "model.dropout":
            content["model"]["dropout"] = value
        elif name == "more added":
            content["added_tokens"] += value
        else:
            content[name] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(RequestError, match=message) as refused:
        load_tokenizer(tmp_path)
    assert "tokenizer.json" in str(refused.value) and "\n" not in str(refused.value) and len(str(refused.value)) < 500


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": None},
        {"normalizer": sequence("normalizers", {"type": "Prepend", "prepend": "\u2581"}, {**REPLACE, "content": "b"})},
        {"pre_tokenizer": sequence("pretokenizers", split(GOOD[2]), BYTES)},
        {"decoder": sequence("decoders", {"type": "ByteFallback"}, {"type": "Fuse"})},
    ],
)
def test_other_plain_tokenizers_are_read(tmp_path: Path, changes: dict[str, Any]) -> None:
    content = json.loads(((ASSETS / "almanac") / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({**content, **changes}).encode())
    assert load_tokenizer(tmp_path).encode("a red circle")


def test_a_panic_of_the_library_is_a_wrong_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its exception derives from BaseException and can only be recognized by its name."""
    tokenizer = load_tokenizer("almanac")
    panic = type("PanicException", (BaseException,), {})

    class Panics:
        def __getattr__(self, name: str) -> Any:
            raise panic("retry-limit-in-match over")

    monkeypatch.setattr(tokenizer, "_tokenizer", Panics())
    with pytest.raises(RequestError, match="cannot run it: retry-limit"):
        tokenizer.encode("any text")
    with pytest.raises(RequestError, match="cannot run it: retry-limit"):
        tokenizer.decode([1])
