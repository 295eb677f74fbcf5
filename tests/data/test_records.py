"""Layouts of records: supported ones and their meaning, refused ones by name; nothing is dropped silently."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visor_jax.data.chat_template import IMAGE_MARKER
from visor_jax.data.media import Video, names_of
from visor_jax.data.records import Record, parse_record
from visor_jax.data.sample import SkipSample, Turn

ASK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
PLAIN = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}]
VIDEO = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "red"}]
OPENAI = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "red"}]
SYSTEM = {"from": "system", "value": "Be terse."}
MARKED, UNMARKED = (Turn("<image>\nWhat?", "red"),), (Turn("What?", "red"),)


def parts(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}, {"role": "assistant", "content": [text("red")]}]


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


READ = {
    "LLaVA": ({"image": "a.png", "conversations": ASK}, Record("0", ("a.png",), MARKED)),
    "images, a list": ({"images": ["a.png"], "conversations": ASK}, Record("0", ("a.png",), MARKED)),
    "images, a name": ({"images": "a.png", "conversations": ASK}, Record("0", ("a.png",), MARKED)),
    "both the same": ({"image": "a.png", "images": ["a.png"], "conversations": ASK}, Record("0", ("a.png",), MARKED)),
    "objects with a path": (
        {"images": [{"bytes": None, "path": "a.png"}], "conversations": ASK},
        Record("0", ("a.png",), MARKED),
    ),
    "messages": (
        {"messages": OPENAI, "images": ["a.png"]},
        Record("0", ("a.png",), (Turn("<image>What?", "red"),)),
    ),
    "role and content": (
        {"image": "a.png", "conversations": OPENAI},
        Record("0", ("a.png",), (Turn("<image>What?", "red"),)),
    ),
    "one key for the conversation empty": (
        {"image": "a.png", "messages": None, "conversation": ASK},
        Record("0", ("a.png",), MARKED),
    ),
    "content parts": (
        {"messages": parts({"type": "image"}, text("What?")), "images": ["a.png"]},
        Record("0", ("a.png",), MARKED),
    ),
    "content parts that name the picture": (
        {"messages": parts({"type": "image_url", "image_url": {"url": "a.png"}}, text("What?")), "image_id": 7},
        Record("0", ("a.png",), MARKED),
    ),
    "content parts, two pictures": (
        {"messages": parts({"type": "image", "image": "a"}, {"type": "image", "path": "b"}, "What?")},
        Record("0", ("a", "b"), (Turn("<image>\n<image>\nWhat?", "red"),)),
    ),
    "no marker": ({"image": "a.png", "conversations": PLAIN}, Record("0", ("a.png",), UNMARKED)),
    "text only": ({"conversations": PLAIN}, Record("0", (), UNMARKED)),
    "text only, image empty": ({"image": "", "conversations": PLAIN}, Record("0", (), UNMARKED)),
    "text only, image null": ({"image": None, "images": [], "conversations": PLAIN}, Record("0", (), UNMARKED)),
    "text only, empty keys": (
        {"image_path": "", "videos": [], "num_images": 0, "conversations": PLAIN},
        Record("0", (), UNMARKED),
    ),
    "other facts about the picture": (
        {"image": "a.png", "image_id": 7, "image_size": [3, 4], "video_id": "x", "conversations": ASK},
        Record("0", ("a.png",), MARKED),
    ),
    "text only, HTML and React": (
        {
            "conversations": [
                {"from": "human", "value": "<img src='a.png'> or <Image>x</Image> or ![](a.png)?"},
                PLAIN[1],
            ]
        },
        Record("0", (), (Turn("<img src='a.png'> or <Image>x</Image> or ![](a.png)?", "red"),)),
    ),
    "numbers about the picture": (
        {"image": "a.png", "image_1": 7, "img_w": 640, "conversations": ASK},
        Record("0", ("a.png",), MARKED),
    ),
    "text only, words about files": (
        {"id": "a.png", "note": "see a.png or b", "conversations": PLAIN},
        Record("a.png", (), UNMARKED),
    ),
    "a number": ({"conversations": [PLAIN[0], {"from": "gpt", "value": 7}]}, Record("0", (), (Turn("What?", "7"),))),
    "a fraction": (
        {"conversations": [PLAIN[0], {"from": "gpt", "value": 0.5}]},
        Record("0", (), (Turn("What?", "0.5"),)),
    ),
    "a system turn": ({"conversations": [SYSTEM, *PLAIN]}, Record("0", (), UNMARKED, "Be terse.")),
    "a system key": ({"system": "Be terse.", "conversations": PLAIN}, Record("0", (), UNMARKED, "Be terse.")),
    "both alike": ({"system": "Be terse.", "messages": [SYSTEM, *PLAIN]}, Record("0", (), UNMARKED, "Be terse.")),
    "both": ({"system": "Hi.", "messages": [SYSTEM, *PLAIN]}, Record("0", (), UNMARKED, "Hi.\nBe terse.")),
    "no system": ({"system": None, "messages": [{"from": "system", "value": ""}, *PLAIN]}, Record("0", (), UNMARKED)),
    "a video, LLaVA's": ({"video": "a.mp4", "conversations": ASK}, Record("0", (Video("a.mp4"),), MARKED)),
    "a video with its own marker": (
        {"id": 1, "video": "a.mp4", "conversations": VIDEO},
        Record("1", (Video("a.mp4"),), MARKED),
    ),
    "a video without a marker": ({"video": "a.mp4", "conversations": PLAIN}, Record("0", (Video("a.mp4"),), UNMARKED)),
    "a video of frames": (
        {"video": ["a/1.jpg", "a/2.JPG"], "conversations": ASK},
        Record("0", (Video(frames=("a/1.jpg", "a/2.JPG")),), MARKED),
    ),
    "a video that the record holds": (
        {"video": {"bytes": b"GIF", "path": "a.gif"}, "conversations": ASK},
        Record("0", (Video("a.gif", b"GIF"),), MARKED),
    ),
    "videos and pictures, in the order of their markers": (
        {
            "messages": [
                {"role": "user", "content": "<video><image> or <video>?"},
                {"role": "assistant", "content": "red"},
            ],
            "images": ["a.png"],
            "videos": ["b.mp4", ["c1.png", "c2.png"]],
        },
        Record(
            "0",
            (Video("b.mp4"), "a.png", Video(frames=("c1.png", "c2.png"))),
            (Turn("<image><image> or <image>?", "red"),),
        ),
    ),
    "content parts, a picture and a video": (
        {"messages": parts({"type": "image", "image": "a"}, {"type": "video", "video": ["b", "c"]}, "What?")},
        Record("0", ("a", Video(frames=("b", "c"))), (Turn("<image>\n<image>\nWhat?", "red"),)),
    ),
    "content parts, a video of the record": (
        {"messages": parts({"type": "video"}, "What?"), "videos": ["a.webm"]},
        Record("0", (Video("a.webm"),), MARKED),
    ),
    "text only, HTML with a video": (
        {"conversations": [{"from": "human", "value": "What does <video> do?"}, PLAIN[1]]},
        Record("0", (), (Turn("What does <video> do?", "red"),)),
    ),
    "a task for each question": (
        {"data_source": ["x", "y"], "conversations": [*PLAIN, *PLAIN]},
        Record("0", (), (Turn("What?", "red", "x"), Turn("What?", "red", "y"))),
    ),
    "a task": (
        {"id": 3, "data_source": "colors", "conversations": PLAIN},
        Record("3", (), (Turn("What?", "red", "colors"),)),
    ),
}


@pytest.mark.parametrize("name", READ)
def test_layouts_that_are_read(name: str) -> None:
    record, expected = READ[name]
    assert parse_record(record, 0) == expected


NAMED = {
    "image_path": (
        "picture_key",
        "'image_path' in the record.*rename it to `image`",
        {"image_path": "a.png", "conversations": PLAIN},
    ),
    "Image": ("picture_key", "'Image'", {"Image": "a.png", "conversations": PLAIN}),
    "img": ("picture_key", "'img'", {"img": "a.png", "conversations": PLAIN}),
    "pictures": ("picture_key", "'pictures'", {"pictures": ["a.png"], "messages": PLAIN}),
    "a file under any key": ("picture_key", "'file_name'", {"file_name": "x/A.JPG", "conversations": PLAIN}),
    "files under any key": ("picture_key", "'paths'", {"paths": ["a.webp"], "conversations": PLAIN}),
    "a picture of a message": (
        "picture_key",
        "'images' in the message",
        {"messages": [{**PLAIN[0], "images": ["a.png"]}, PLAIN[1]]},
    ),
    "a file in an object": ("picture_key", "'meta'", {"meta": {"path": "a.jpg"}, "conversations": PLAIN}),
    "files in objects": ("picture_key", "'files'", {"files": [{"path": "a.heic"}], "conversations": PLAIN}),
    "a second picture": (
        "picture_key",
        "'image_2' holds a picture too.*list all in `image`",
        {"image": "a.png", "image_2": "b.png", "conversations": ASK},
    ),
    **{
        f"{mark} for a picture": (
            "foreign_marker",
            "another program's marker.*write <image> there",
            {**record, "conversations": [{"from": "human", "value": f"{mark}\nWhat?"}, PLAIN[1]]},
        )
        for record in ({}, {"image": "a.png"})
        for mark in (
            "Picture 1: <img>a b.jpg</img>",
            "<|image_1|>",
            "<|vision_start|><|image_pad|><|vision_end|>",
            "<ImageHere>",
            "<image 1>",
            "<image_00>",
            "<IMAGE>",
            "<Image>",
            "[IMG]",
        )
    },
    "pairs": ("unknown_layout", "a message is a list.*expected", {"conversations": [["What?", "red"]]}),
    "image_id alone": ("picture_key", "'image_id'", {"image_id": 7, "conversations": PLAIN}),
    "video_path": ("picture_key", "'video_path'", {"video_path": "a.mp4", "conversations": PLAIN}),
    "audios": ("audio", "'audios': sound is not supported", {"audios": ["a.wav"], "conversations": PLAIN}),
    "a video and a picture, one marker": (
        "image_count",
        "0 <video> and 1 <image> markers, 1 videos and 1 pictures; write one marker where",
        {"videos": ["a"], "image": "a.png", "conversations": ASK},
    ),
    "two videos, one marker": ("image_count", "1 <image> markers, 2", {"video": ["a", "b"], "conversations": ASK}),
    "a <video> marker too many": (
        "image_count",
        "1 <video> and 0 <image> markers, 2 videos and 0 pictures",
        {"videos": ["a.mp4", "b.mp4"], "conversations": VIDEO},
    ),
    "a <video> marker without a video": ("image_count", "no video; name it in `video`", {"conversations": VIDEO}),
    "two keys for videos": ("bad_record", "different videos", {"video": "a", "videos": ["b"], "conversations": VIDEO}),
    "a video of another kind": ("bad_record", "`video` is neither", {"video": 3, "conversations": VIDEO}),
    "half a pair in a frame": ("bad_text", "name", {"videos": [["\ud800.png"]], "conversations": VIDEO}),
    "more tasks than questions": ("bad_record", "2 tasks for 1 q", {"data_source": ["a", "b"], "conversations": PLAIN}),
    "Alpaca": ("unknown_layout", "`instruction` and `output`: the Alpaca", {"instruction": "a", "output": "b"}),
    "ms-swift": ("unknown_layout", "`query` and `response`", {"query": "a", "response": "b", "images": ["a.png"]}),
    "VQA": ("unknown_layout", '`question` and `answer`.*expected "conv', {"question": "a", "answer": "b"}),
    "preferences": ("unknown_layout", "preference pairs", {"prompt": "a", "chosen": "b", "rejected": "c"}),
    "captions": ("unknown_layout", "caption", {"image": "a.png", "caption": "b"}),
    "JSON in JSON": ("unknown_layout", "`conversations` is text", {"conversations": json.dumps(PLAIN)}),
    "a part of another kind": ("unknown_layout", "'audio'", {"messages": parts({"type": "audio"})}),
    "no conversation": ("empty_conversation", r"the keys \('id', 'q'\)", {"id": 1, "q": 2}),
    "no keys": ("empty_conversation", "the keys .none", {}),
    "a list": ("bad_record", "got list", [1]),
    "a truth": ("bad_record", "`value` is bool", {"conversations": [PLAIN[0], {"from": "gpt", "value": True}]}),
    "no number": ("bad_record", "`value` is float", {"conversations": [{"from": "human", "value": float("nan")}]}),
    "bytes": ("bad_record", "without a `path`", {"image": {"bytes": "AAAA"}, "conversations": ASK}),
    "an empty name among others": (
        "bad_record",
        "one of them is empty",
        {"image": ["a.png", ""], "conversations": ASK},
    ),
    "two keys": ("bad_record", "different pictures", {"image": "a", "images": ["b"], "conversations": ASK}),
    "names in two places": (
        "bad_record",
        "by the record and by its messages",
        {"image": "a.png", "messages": parts({"type": "image", "image": "a.png"}, "What?")},
    ),
    "a system of another kind": ("bad_record", "`system` is list", {"system": ["a"], "conversations": PLAIN}),
    "a late system turn": ("turn_order", "is a system", {"conversations": [*PLAIN, SYSTEM]}),
    "two pictures, no marker": (
        "image_count",
        "0 <image> markers, 2 pictures; write one <image> where each",
        {"image": ["a", "b"], "conversations": PLAIN},
    ),
    "a marker without a picture": ("image_count", "1 <image> markers, 0 pictures", {"conversations": ASK}),
    "half a pair in the id": ("bad_text", "`id`", {"id": "\ud800", "conversations": PLAIN}),
    "half a pair in the task": ("bad_text", "`data_source`", {"data_source": "\ud800", "conversations": PLAIN}),
    "half a pair in a name": ("bad_text", "picture's name", {"image": "\udfff.png", "conversations": ASK}),
    "half a pair in the system": ("bad_text", "`system`", {"system": "\ud800", "conversations": PLAIN}),
    "half a pair in a question": ("bad_text", "message", {"conversations": [{"from": "human", "value": "\ud800"}]}),
    "NUL in a part": ("bad_text", "message", {"messages": parts(text("a\0b"))}),
}


@pytest.mark.parametrize("name", NAMED)
def test_layouts_that_are_named(name: str) -> None:
    reason, detail, record = NAMED[name]
    with pytest.raises(SkipSample, match=detail) as caught:
        parse_record(record, 0)
    assert caught.value.reason == reason


KEYS = ["id", "image", "images", "conversations", "messages", "system", "data_source", "from", "value", "role",
        "content", "type", "text", "url", "path", "video", "videos", "image_path"]  # fmt: skip
WORDS = [
    "human",
    "gpt",
    "user",
    "assistant",
    "system",
    "image",
    "video",
    "text",
    "<image>",
    "<video>\n",
    "a.png",
    "",
    "\ud800",
    "\0",
]
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
OTHERS = dict.fromkeys([key for key in KEYS if key != "conversations"], values)
messages = st.lists(
    st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system"]), "value": values}),
    min_size=1,
    max_size=4,
)


@given(values | st.fixed_dictionaries({"conversations": messages}, optional=OTHERS))
def test_any_json_is_a_record_or_skipped(value: Any) -> None:
    """No other error is raised, and results can be encoded and have their pictures in place."""
    try:
        actual = parse_record(value, 3)
    except SkipSample as why:
        assert why.reason and why.detail
        return
    names = [name for picture in actual.pictures for name in names_of(picture)]
    everything = [actual.id, *names, actual.system, *(t for turn in actual.turns for t in turn.__dict__.values())]
    assert all("\0" not in one and one.encode() is not None for one in everything)
    assert actual.turns and all(turn.question.strip() and turn.answer.strip() for turn in actual.turns)
    assert all(actual.pictures) and all(names)
    markers = sum(turn.question.count(IMAGE_MARKER) for turn in actual.turns)
    assert markers == len(actual.pictures) or (markers, len(actual.pictures)) == (0, 1)


@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1, max_size=3), st.text())
def test_what_is_well_formed_comes_back_word_for_word(turns: list[tuple[str, str]], system: str) -> None:
    texts = [part for turn in turns for part in turn]
    conversation = [
        {"from": who, "value": text} for who, text in zip(["human", "gpt"] * len(turns), texts, strict=True)
    ]
    if any("\0" in one or IMAGE_MARKER in one for one in (*texts, system)) or not all(map(str.strip, texts)):
        return
    record = parse_record(json.loads(json.dumps({"system": system, "conversations": conversation})), 0)
    assert [(turn.question, turn.answer) for turn in record.turns] == turns and record.system == system.strip()
