"""Pictures and videos as a record names or holds them.

In: values under a record's keys, as JSON or a table gives them. Out: `Picture`s, or `SkipSample`. Opens no file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from visor_jax.data.chat_template import IMAGE_MARKER
from visor_jax.data.sample import SkipSample, Turn

VIDEO_MARKER = "<video>"  # where a video belongs, in a record that has one
PICTURE_KEYS = ("image", "images")
VIDEO_KEYS = ("video", "videos")

_STILL_FILE = re.compile(r".*\.(jpe?g|png)", re.IGNORECASE | re.DOTALL)
_LONE_VIDEO_MARKER = re.compile(r"\A\s*<video>\s*\n|\n\s*<video>\s*\Z")


@dataclass(frozen=True)
class EmbeddedPicture:
    """An encoded picture that a record holds itself; `name` is for messages, and may be ""."""

    data: bytes = field(repr=False)
    name: str = ""


@dataclass(frozen=True)
class Video:
    """A video: the name of a file or folder, or the content of a file, or its frames in order."""

    name: str = ""
    data: bytes = field(default=b"", repr=False)
    frames: tuple[str | EmbeddedPicture, ...] = ()


Picture = str | EmbeddedPicture | Video  # the name of a picture's file, its content, or a video


def names_of(picture: Picture) -> list[str]:
    """Returns the names of a picture's or a video's files; empty where the record holds them."""
    if isinstance(picture, Video):
        parts = [picture.name, *(name for frame in picture.frames for name in names_of(frame))]
        return [name for name in parts if name]
    name = picture.name if isinstance(picture, EmbeddedPicture) else picture
    return [name] if name else []


def pictures_of(value: Any, key: str) -> list[str | EmbeddedPicture]:
    """Returns the pictures in the value of a picture key; "" and null mean no picture.

    Raises:
      SkipSample: "bad_record".
    """
    pictures = [picture_of(item, key) for item in (value if isinstance(value, list) else [value])]
    if all(not picture for picture in pictures):
        return []
    if not all(pictures):
        raise SkipSample("bad_record", f"`{key}` holds names, but one of them is empty")
    return pictures


def picture_of(item: Any, key: str) -> str | EmbeddedPicture:
    """Returns a picture by its name, or by its bytes as tables hold them (`{"bytes", "path"}`); "" for none.

    Raises:
      SkipSample: "bad_record".
    """
    if isinstance(item, bytes):
        return EmbeddedPicture(item)
    name = item
    if isinstance(item, dict):
        name, data = item.get("path"), item.get("bytes")
        if isinstance(data, bytes):
            return EmbeddedPicture(data, name if isinstance(name, str) else "")
        if name is None and not ("bytes" in item and data is None):
            raise SkipSample("bad_record", f"`{key}` holds an object without a `path`; expected the name of a file")
    if name is not None and not isinstance(name, str):
        raise SkipSample("bad_record", f"`{key}` is neither a name nor a list of names")
    return name or ""


def videos_of(value: Any, key: str) -> list[Video]:
    """Returns the videos in the value of a video key; "" and null mean no video.

    A list holds one video per item; a list of JPEG or PNG files, or an inner list, holds the frames of one.

    Raises:
      SkipSample: "bad_record".
    """
    items = value if isinstance(value, list) else [value]
    if (
        isinstance(value, list)
        and value
        and all(isinstance(item, str) and _STILL_FILE.fullmatch(item) for item in items)
    ):
        items = [items]
    return [video for item in items if (video := video_of(item, key)) is not None]


def video_of(item: Any, key: str) -> Video | None:
    """Returns one video: a name, its bytes (`{"bytes", "path"}`), or a list of its frames; None for none.

    Raises:
      SkipSample: "bad_record".
    """
    if isinstance(item, list):
        frames = tuple(pictures_of(item, key))
        return Video(frames=frames) if frames else None
    video = picture_of(item, key)
    if isinstance(video, EmbeddedPicture):
        return Video(video.name, video.data)
    return Video(video) if video else None


def place_videos(turns: Sequence[Turn], media: Sequence[Picture]) -> tuple[tuple[Turn, ...], Sequence[Picture]]:
    """Gives every video the marker of a picture, and puts pictures and videos in the order of their markers.

    `<video>` marks videos and `<image>` pictures; where a record has videos only and no `<video>`, `<image>` marks
    videos, as in LLaVA-Video's records. Without any video `<video>` is text, for example HTML.

    Raises:
      SkipSample: "image_count".
    """
    videos = [one for one in media if isinstance(one, Video)]
    pictures = [one for one in media if not isinstance(one, Video)]
    questions = [turn.question for turn in turns]
    marks = re.findall(f"{VIDEO_MARKER}|{IMAGE_MARKER}", "\n".join(questions))
    if not videos:
        if any(_LONE_VIDEO_MARKER.search(question) for question in questions):
            raise SkipSample("image_count", f"a {VIDEO_MARKER} marker, but no video; name it in `video`")
        return tuple(turns), pictures
    if VIDEO_MARKER not in marks and not pictures:
        return tuple(turns), videos
    if (marks.count(VIDEO_MARKER), marks.count(IMAGE_MARKER)) != (len(videos), len(pictures)):
        raise SkipSample(
            "image_count",
            f"{marks.count(VIDEO_MARKER)} {VIDEO_MARKER} and {marks.count(IMAGE_MARKER)} {IMAGE_MARKER} markers,"
            f" {len(videos)} videos and {len(pictures)} pictures; write one marker where each belongs",
        )
    left = {VIDEO_MARKER: iter(videos), IMAGE_MARKER: iter(pictures)}
    placed = [replace(turn, question=turn.question.replace(VIDEO_MARKER, IMAGE_MARKER)) for turn in turns]
    return tuple(placed), [next(left[mark]) for mark in marks]


def mark_videos(questions: Sequence[str], is_video: Sequence[bool]) -> list[str]:
    """Returns questions in which every marker of a video is `<video>`; the inverse of `place_videos`.

    Args:
      questions: with one `<image>` for each picture and video, or without any.
      is_video: for each of them, in the order of their markers.
    """
    kinds = iter(is_video)
    return [
        re.sub(IMAGE_MARKER, lambda _: VIDEO_MARKER if next(kinds) else IMAGE_MARKER, question)
        for question in questions
    ]
