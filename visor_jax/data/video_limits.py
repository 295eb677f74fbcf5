"""How many frames of a video are used, and how large they may be: checked before any frame is decoded."""

from __future__ import annotations

from dataclasses import dataclass

from visor_jax.config.data_fields import DEFAULT_MAX_PIXELS
from visor_jax.data.sample import SkipSample

MAX_STORED_FRAMES = 1_000_000  # of one video; nine hours at 30 frames per second


@dataclass(frozen=True)
class VideoLimits:
    """How many frames of a video are used, and how large they may be.

    Attributes:
        max_frames: frames that are used; a longer video is sampled evenly.
        max_pixels: height times width of one frame.
        room: pixels of all frames that are used, together.
        max_tiles: of the row that holds the video, each frame takes one; None for any number.
    """

    max_frames: int
    max_pixels: int = DEFAULT_MAX_PIXELS
    room: int = DEFAULT_MAX_PIXELS
    max_tiles: int | None = None

    def numbers(self, stored: int, shown: str) -> list[int]:
        """Returns which of `stored` frames are used: all, or `max_frames` evenly spaced with the first and the last.

        Raises:
            SkipSample: "broken_video" for a video without frames, "too_large" for one with too many to look through,
                "too_long" for more than the row holds.
        """
        if stored < 1:
            raise SkipSample("broken_video", f"{shown} has no frame")
        if stored > MAX_STORED_FRAMES:
            raise SkipSample("too_large", f"{shown} has {stored} frames; at most {MAX_STORED_FRAMES} are allowed")
        used = min(stored, self.max_frames)
        if self.max_tiles is not None and used > self.max_tiles:
            raise SkipSample(
                "too_long", f"{shown}: {used} frames; data.tiles={self.max_tiles} holds fewer; lower data.max_frames"
            )
        if stored <= self.max_frames:
            return list(range(stored))
        return [number * (stored - 1) // max(self.max_frames - 1, 1) for number in range(self.max_frames)]

    def check(self, frames: int, height: int, width: int, shown: str) -> None:
        """Checks the size of the frames that are used, before they are decoded.

        Raises:
            SkipSample: "broken_video" for frames without pixels, "too_many_pixels".
        """
        if height < 1 or width < 1:
            raise SkipSample("broken_video", f"{shown} is {width}x{height}: it has no pixels")
        if height * width > self.max_pixels:
            raise SkipSample(
                "too_many_pixels",
                f"{shown} is {width}x{height}; at most {self.max_pixels} pixels per frame are allowed",
            )
        if frames * height * width > self.room:
            raise SkipSample(
                "too_many_pixels",
                f"{shown}: {frames} frames of {width}x{height} have more than {self.room} pixels, the room that is left"
                " for this record; lower data.max_frames",
            )
