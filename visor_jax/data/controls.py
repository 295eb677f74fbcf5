"""Questions whose pictures are replaced, to measure how much of an accuracy needs the picture.

In: the source and the number of questions of an evaluation. Out: the same questions, each with another picture:
"blind" replaces every picture by a uniform gray one of the same size, "shuffled" by the pictures of another question of
the same task. Both follow from the list of questions alone, so a resumed pass and several processes see the same ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from visor_jax.config import Config, ConfigLike, as_config
from visor_jax.data.collate import Example
from visor_jax.data.from_config import evaluation_source
from visor_jax.data.questions import Facts, Place, Questions
from visor_jax.data.sample import Sample, SkipSample, Source
from visor_jax.data.skips import SkipLog

CONTROLS = ("blind", "shuffled")
GRAY = 128


class ControlQuestions(Questions):
    """At most `count` questions of a source, in its order, with their pictures replaced when they are encoded.

    A question of "shuffled" for which no other one can stand in is skipped as "no_other_picture".
    """

    def __init__(
        self, config: Config, source: Source, count: int, *, control: str, skips: SkipLog | None = None
    ) -> None:
        """
        Args:
          control: one of `CONTROLS`.
        """
        super().__init__(config, source, count, skips=skips)
        self._control = control
        self._donors = donors({place: self.facts(place) for place in self.plan()}) if control == "shuffled" else {}

    def _encode(self, single: Sample) -> Example:
        return super()._encode(self.controlled(single))

    def controlled(self, single: Sample) -> Sample:
        """Returns a question of this list with its pictures replaced.

        Raises:
          SkipSample: no other question has a picture for it, or that picture cannot be read.
        """
        if self._control == "blind":
            return dataclasses.replace(single, images=tuple(np.full_like(image, GRAY) for image in single.images))
        donor = self._donors.get(Place.of(single.id))
        if donor is None:
            raise SkipSample("no_other_picture", f"task {single.turns[0].task!r} has no question about another picture")
        return dataclasses.replace(self.read(donor), id=single.id, turns=single.turns, system=single.system)

    def has_picture(self, place: Place) -> bool:
        """Returns whether a planned question can be asked."""
        return self._control == "blind" or place in self._donors


def donors(facts: Mapping[Place, Facts]) -> Mapping[Place, Place]:
    """Maps each question to the one whose pictures it is asked about: another sample's, of the same task.

    The samples of a task that have equally many pictures are rotated by half their number, so that neighbors, which
    may be about the same picture, do not exchange theirs. A question is missing where its group has one sample only.
    """
    groups: dict[tuple[str, int], dict[int, Place]] = {}
    for place, of_one in facts.items():
        groups.setdefault((of_one.task, of_one.pictures), {}).setdefault(place.index, place)
    chosen = {}
    for place, of_one in facts.items():
        group = groups[of_one.task, of_one.pictures]
        indices = list(group)
        if len(indices) > 1:
            other = indices[(indices.index(place.index) + len(indices) // 2) % len(indices)]
            chosen[place] = group[other]
    return chosen


def control_questions(config: ConfigLike, split: str, control: str, skips: SkipLog | None = None) -> ControlQuestions:
    """Returns the first questions of an evaluation (`evaluate.control_samples`) with their pictures replaced."""
    config = as_config(config)
    count = min(config.evaluate.samples, config.evaluate.control_samples)
    return ControlQuestions(config, evaluation_source(config, split), count, control=control, skips=skips)
