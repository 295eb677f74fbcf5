"""From the features of a TFDS data set to a record: which feature holds what, and the values as JSON.

In: the data set's features, the mapping `data.features`, and examples with pictures still encoded. Out: records as
`visor_jax.data.records` parses them. TensorFlow is not imported.

The mapping is "key=feature, ..."; a feature inside another is "outer/inner", and a text in quotes stands for itself:
`image=image, question='Which digit is this?', answer=label`. Without a mapping, features are used by the names of the
keys, and data sets of our builder `visor_jax_data` by their own layout.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from visor_jax.data.chat_template import IMAGE_MARKER, images_before
from visor_jax.data.media import PICTURE_KEYS, VIDEO_KEYS
from visor_jax.data.records import CONVERSATION_KEYS
from visor_jax.data.sample import SkipSample
from visor_jax.errors import RequestError, nearest

KEYS = ("id", *PICTURE_KEYS, *VIDEO_KEYS, "question", "answer", *CONVERSATION_KEYS, "system", "data_source")
BUILDER_LAYOUT = frozenset({"id", "system", "turns", "images", "frames"})  # features of `visor_jax_data`

_ENTRY = re.compile(r"""\s*(\w+)\s*=\s*(?:'([^']*)'|"([^"]*)"|([\w/.-]+))\s*(?:,|$)""")
_EXAMPLE = "image=image, question=question, answer=answer"


@dataclass(frozen=True)
class Literal:
    """A text of the mapping that stands for itself."""

    text: str


Mapped = Mapping[str, Literal | tuple[str, ...]]  # key of a record -> a text, or the path of a feature


def parse_mapping(text: str) -> Mapped:
    """Parses `data.features`; "" gives an empty mapping.

    Raises:
        RequestError: it is not a list of "key=feature", a key is unknown or given twice, or no key holds text.
    """
    mapped: dict[str, Literal | tuple[str, ...]] = {}
    position = 0
    while position < len(text.rstrip(" ,")):
        entry = _ENTRY.match(text, position)
        if entry is None:
            raise RequestError(
                f"data.features={text!r}: cannot be read from {text[position:][:40]!r} on; expected {_EXAMPLE!r}"
            )
        key, *values = entry.groups()
        if key not in KEYS or key in mapped:
            problem = "is given twice" if key in mapped else f"is unknown; expected some of {', '.join(KEYS)}"
            raise RequestError(f"data.features={text!r}: {key!r} {problem}")
        path, literal = values[2], next((value for value in values[:2] if value is not None), None)
        mapped[key] = Literal(literal) if literal is not None else tuple(path.split("/"))
        position = entry.end()
    if mapped and not ({"question", "answer"} <= set(mapped) or set(mapped) & set(CONVERSATION_KEYS)):
        raise RequestError(f"data.features={text!r}: expected question=... and answer=..., or conversations=...")
    return mapped


def default_mapping(features: Mapping[str, Any], name: str) -> Mapped:
    """Returns the mapping of features that have the names of keys.

    Raises:
        RequestError: they hold no conversation.
    """
    mapped = {key: (key,) for key in KEYS if key in features}
    if {"question", "answer"} <= set(mapped) or set(mapped) & set(CONVERSATION_KEYS):
        return mapped
    known = ", ".join(sorted(features))
    raise RequestError(
        f"data.features='': {name} has no features question and answer, or conversations, but {known};"
        f" expected which of them hold what, such as {_EXAMPLE!r}"
    )


def check_paths(mapped: Mapped, features: Any, name: str) -> None:
    """Checks that the features of a mapping exist.

    Raises:
        RequestError: one does not.
    """
    for key, path in mapped.items():
        inner = features
        for depth, part in enumerate(() if isinstance(path, Literal) else path):
            inner = inner_features(inner)
            if inner is None or part not in inner:
                known = sorted(inner or ())
                hint = nearest(part, known)
                where = "/".join(path[: depth + 1]) if isinstance(path, tuple) else ""
                raise RequestError(
                    f"data.features: {key}={where}: {name} has no such feature; expected one of {', '.join(known)}"
                    + (f"; {hint}" if hint else "")
                )
            inner = inner[part]


def inner_features(feature: Any) -> Mapping[str, Any] | None:
    """Returns the features inside a `FeaturesDict`, or inside a sequence of one; None for another feature."""
    from tensorflow_datasets import features as kinds

    if type(feature) is kinds.Sequence:
        feature = feature.feature
    return cast(Mapping[str, Any], feature) if isinstance(feature, kinds.FeaturesDict) else None


def plain(value: Any, feature: Any) -> Any:
    """Returns a feature's value as JSON has it; pictures and other bytes that are not text as `{"bytes": ...}`.

    A class label becomes its name, a sequence of dicts a list of dicts.
    """
    from tensorflow_datasets import features as kinds

    if isinstance(feature, kinds.FeaturesDict):
        return {key: plain(value[key], inner) for key, inner in feature.items()}
    if isinstance(feature, kinds.Image):
        return {"bytes": bytes(value), "path": None}
    if isinstance(feature, kinds.Sequence):  # also a Video
        if isinstance(feature.feature, kinds.FeaturesDict):
            columns = {key: plain(value[key], kinds.Sequence(inner)) for key, inner in feature.feature.items()}
            return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return [plain(item, feature.feature) for item in value]
    if isinstance(feature, kinds.ClassLabel):
        return feature.int2str(int(value)) if int(value) >= 0 else ""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return {"bytes": value, "path": None}
    if isinstance(value, np.ndarray):
        return plain(value.item(), feature) if value.ndim == 0 else [plain(item, feature) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def mapped_record(mapped: Mapped, get: Callable[[tuple[str, ...]], Any]) -> dict[str, Any]:
    """Returns the record that a mapping makes of an example.

    Args:
        mapped: the mapping.
        get: path of a feature -> its plain value.

    Raises:
        SkipSample: "bad_json", "bad_record".
    """
    values = {key: path.text if isinstance(path, Literal) else get(path) for key, path in mapped.items()}
    record = {key: value for key, value in values.items() if key not in ("question", "answer")}
    if isinstance(record.get("video"), list):  # the frames of one video
        record["video"] = [record["video"]]
    for key in CONVERSATION_KEYS:
        if isinstance(record.get(key), str):
            try:
                record[key] = json.loads(record[key])
            except (ValueError, RecursionError) as error:
                raise SkipSample("bad_json", f"{key}: {error}") from None
    if "question" in values and "answer" in values:
        pairs = _pairs(values["question"], values["answer"])
        pictures = next((record[key] for key in PICTURE_KEYS if record.get(key)), None)
        count = len(pictures) if isinstance(pictures, list) else 1
        if pairs and count > 1 and not any(IMAGE_MARKER in str(question) for question, _ in pairs):
            pairs[0] = (images_before(str(pairs[0][0]), count), pairs[0][1])
        turns = [({"from": "human", "value": question}, {"from": "gpt", "value": answer}) for question, answer in pairs]
        record["conversations"] = [message for turn in turns for message in turn]
    return record


def _pairs(question: Any, answer: Any) -> list[tuple[Any, Any]]:
    """Returns questions with their answers; of several answers to one question, the most frequent one."""
    if isinstance(question, list) and isinstance(answer, list):
        if len(question) != len(answer):
            raise SkipSample("bad_record", f"{len(question)} questions, {len(answer)} answers")
        return list(zip(question, answer, strict=True))
    if isinstance(question, list):
        raise SkipSample("bad_record", "several questions, but one answer")
    if isinstance(answer, list):
        counts = Counter(str(one) for one in answer)
        answer = counts.most_common(1)[0][0] if counts else ""
    return [(question, str(answer) if isinstance(answer, bool) else answer)]


def builder_record(example: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the record that `visor_jax_data` stored; the inverse of its `encode_sample`.

    Args:
        example: the plain values of `BUILDER_LAYOUT`.

    Raises:
        SkipSample: "bad_record": `frames` does not fit `images`.
    """
    frames, images = [int(count) for count in example["frames"]], list(example["images"])
    if min(frames, default=0) < 0 or sum(count or 1 for count in frames) != len(images):
        raise SkipSample("bad_record", f"`frames` {frames[:20]} does not fit {len(images)} images")
    pictures, videos, start = [], [], 0
    for count in frames:
        (videos if count else pictures).append(images[start : start + count] if count else images[start])
        start += count or 1
    turns = example["turns"]
    messages = [
        ({"from": "human", "value": turn["question"]}, {"from": "gpt", "value": turn["answer"]}) for turn in turns
    ]
    return {
        "id": example["id"],
        "system": example["system"],
        "data_source": [turn["task"] for turn in turns],
        "image": pictures,
        "video": videos,
        "conversations": [message for turn in messages for message in turn],
    }
