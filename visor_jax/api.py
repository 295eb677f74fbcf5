"""The Python interface: load a trained model, ask it questions, get answers with receipts.

    import visor_jax
    model = visor_jax.load("runs/glyphs_mini")
    answer = model.answer(image, "Which digit is below A?")        # Answer(text, budget, flops, ...)

A `Visor` compiles per bucket of shapes and per budget, and keeps what it compiled.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from PIL import Image

from visor_jax import config as configs
from visor_jax.architecture import Architecture
from visor_jax.budget import Budget, budget_name, cache_bytes, decode_flops, decoder_flops, route_flops, tower_flops
from visor_jax.data.collate import Batch, Example, Window, encode_prompt, encode_tokens, make_prompt_batch
from visor_jax.data.sample import SkipSample
from visor_jax.data.splits import make_tokenizer
from visor_jax.data.tokenizer import ChatTokenizer, load_tokenizer
from visor_jax.errors import RequestError
from visor_jax.export import hf_import
from visor_jax.model import cache as caches
from visor_jax.model.layers import Params
from visor_jax.model.policy import choose
from visor_jax.model.visor import abstract_params, encode, logits
from visor_jax.scale.mesh import build_mesh
from visor_jax.search import read_viable
from visor_jax.train.checkpoints import restore_params
from visor_jax.workdir import Workdir, as_path

Bits = tuple[bool, ...]
Picture = Image.Image | np.ndarray
TEXT_BUCKET = 32  # prompts and answers are padded to multiples of this many tokens
VISUAL_BUCKET = 256
MODEL_STAGES = ("policy", "universal", "full", "dense", "warmup", "base")  # the newest complete one is loaded


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer and its receipt.

    Attributes:
      text: the answer, without special tokens.
      budget: name of the budget it was given under.
      flops: all FLOPs of this answer: tower, connector, routing, prefill and every decoding step.
      decoder_flops: those of the decoder (and routing) alone.
      seconds_to_first_token, seconds: wall time, compilation included when this shape was new.
      cache_bytes: keys and values held for this sample at the end of the answer.
    """

    text: str
    budget: str
    flops: float
    decoder_flops: float
    seconds_to_first_token: float
    seconds: float
    cache_bytes: int


class Visor:
    """A model with its tokenizer: answers, logits, routes. Made by `load`."""

    def __init__(
        self,
        params: Params,
        arch: Architecture,
        tokenizer: ChatTokenizer,
        viable_budgets: Sequence[Bits],
        *,
        system: str | None = None,
        has_policy: bool = False,
        stage: str = "",
    ):
        self.params, self.arch, self.tokenizer, self.system = params, arch, tokenizer, system
        self.stage = stage
        self.viable_budgets = [tuple(bits) for bits in viable_budgets]
        self.has_policy = has_policy
        self._programs: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def with_params(self, params: Params) -> Visor:
        """The same model with other parameters of the same shapes."""
        return Visor(
            params,
            self.arch,
            self.tokenizer,
            self.viable_budgets,
            system=self.system,
            has_policy=self.has_policy,
            stage=self.stage,
        )

    # --- questions ----------------------------------------------------------------------------------------------------

    def answer(
        self,
        image: Picture | Sequence[Picture],
        question: str,
        budget: str | Budget = "auto",
        max_new_tokens: int = 64,
        dial: float = 0.0,
    ) -> Answer:
        """Greedy answer to one question about one picture (or several).

        Raises:
          RequestError: an unusable picture or question, a budget that does not fit, "auto" without a policy.
        """
        return self.answer_many([(image, question)], budget, max_new_tokens, dial)[0]

    def answer_many(
        self,
        questions: Sequence[tuple[Picture | Sequence[Picture], str]],
        budget: str | Budget = "auto",
        max_new_tokens: int = 64,
        dial: float = 0.0,
    ) -> list[Answer]:
        """Answers to many questions, in order; the same as one by one."""
        if max_new_tokens < 1:
            raise RequestError(f"max_new_tokens={max_new_tokens}: expected at least 1")
        if not math.isfinite(dial):
            raise RequestError(f"dial={dial}: expected a finite number")
        wanted = self._budget(budget)
        return [
            self._answer(self._prompt(image, question), wanted, max_new_tokens, dial) for image, question in questions
        ]

    def logits(
        self, token_ids: Sequence[int], images: Sequence[Picture], budget: str | Budget = "full"
    ) -> Float[np.ndarray, "S V"]:
        """Next-token logits at every text token of a sequence with one placeholder id per picture, in order."""
        pictures = [pixels(image) for image in images]
        example = usable(partial(encode_tokens, token_ids, pictures, self.tokenizer.image_token_id, self.arch))
        bits = self._budget(budget)
        batch = self._batch(example)
        if bits is None:
            prompt_batch = {**batch.arrays}
            bits = self.viable_budgets[self._pick(self._scores(prompt_batch), prompt_batch, 0.0)]
        program = self._program("logits", lambda: jax.jit(partial(logits, arch=self.arch)))
        found = program(self.params, batch.arrays, jnp.asarray(bits, bool))
        return np.asarray(found)[0, : len(example.text_tokens)]

    def route(self, image: Picture | Sequence[Picture], question: str) -> Float[np.ndarray, " viable"]:
        """The policy's probabilities over `viable_budgets`."""
        self._require_policy()
        batch = self._batch(self._prompt(image, question))
        scores = self._scores(batch.arrays)[0, : len(self.viable_budgets)]
        return np.asarray(jax.nn.softmax(scores))

    # --- one answer ---------------------------------------------------------------------------------------------------

    def _answer(self, prompt: Example, bits: Bits | None, max_new_tokens: int, dial: float) -> Answer:
        began = time.perf_counter()
        batch = self._batch(prompt)
        arrays = {name: jnp.asarray(x) for name, x in batch.arrays.items()}
        routed = bits is None
        visual = self._program("encode", lambda: jax.jit(partial(encode, arch=self.arch)))(self.params, arrays)
        prefix, scores = self._prefix_program(routed)(self.params, visual, arrays)
        if bits is None:
            bits = self.viable_budgets[self._pick(scores, batch.arrays, dial)]
        capacity = arrays["text_tokens"].shape[1] + -(-max_new_tokens // TEXT_BUCKET) * TEXT_BUCKET
        scores, cache = self._rest_program(bits, capacity)(self.params, prefix, arrays)
        token = int(jnp.argmax(scores[0]))
        first = time.perf_counter() - began
        tokens: list[int] = []
        step = self._step_program(bits)
        while token != self.tokenizer.end_token_id and len(tokens) < max_new_tokens:
            tokens.append(token)
            if len(tokens) == max_new_tokens:
                break
            scores, cache = step(self.params, jnp.asarray([token]), cache)
            token = int(jnp.argmax(scores[0]))
        return self._receipt(prompt, tokens, bits, routed, first, time.perf_counter() - began)

    def _receipt(
        self, prompt: Example, tokens: list[int], bits: Bits, routed: bool, first: float, total: float
    ) -> Answer:
        num_visual, num_text = prompt.size.visual, prompt.size.text
        decoder = decoder_flops(self.arch, bits, num_visual, num_text)
        decoder += sum(decode_flops(self.arch, bits, num_visual, num_text + i) for i in range(1, len(tokens) + 1))
        if routed:
            decoder += route_flops(self.arch, num_visual, num_text)
        bytes_per_value = self.params["embed_tokens"]["embedding"].dtype.itemsize
        return Answer(
            text=self.tokenizer.decode(tokens),
            budget=budget_name(bits) if bits else "dense",
            flops=decoder + tower_flops(self.arch, prompt.size.tiles),
            decoder_flops=decoder,
            seconds_to_first_token=first,
            seconds=total,
            cache_bytes=int(cache_bytes(self.arch, bits, num_visual, num_text + len(tokens), bytes_per_value)),
        )

    # --- budgets ------------------------------------------------------------------------------------------------------

    def _budget(self, budget: str | Budget) -> Bits | None:
        """The bits of a budget, or None for "auto"."""
        wanted = budget if isinstance(budget, Budget) else Budget.parse(str(budget))
        if self.arch.plan == "dense":
            return ()
        if str(wanted) == "auto":
            self._require_policy()
            return None
        return wanted.resolve(self.arch.num_slots, self.viable_budgets or None)

    def _require_policy(self) -> None:
        if not self.has_policy:
            raise RequestError(
                "budget=auto: this model has no trained policy; name a budget (empty, full, 0b...) or run stage policy"
            )

    def _pick(self, scores: jax.Array, arrays: dict[str, np.ndarray], dial: float) -> int:
        num_visual = int((arrays["visual_segments"] > 0).sum())
        num_text = int((arrays["text_segments"] > 0).sum())
        costs = [decoder_flops(self.arch, bits, num_visual, num_text) for bits in self.viable_budgets]
        return int(choose(scores, jnp.asarray(costs), dial)[0])

    def _scores(self, arrays: dict[str, np.ndarray]) -> jax.Array:
        visual = self._program("encode", lambda: jax.jit(partial(encode, arch=self.arch)))(self.params, arrays)
        _, scores = self._prefix_program(True)(self.params, visual, arrays)
        return scores

    # --- shapes and programs ------------------------------------------------------------------------------------------

    def _prompt(self, image: Picture | Sequence[Picture], question: str) -> Example:
        if not question.strip():
            raise RequestError("question: is empty; ask something about the picture")
        pictures = [pixels(one) for one in image] if isinstance(image, Sequence) else [pixels(image)]
        return usable(partial(encode_prompt, pictures, question, self.tokenizer, self.arch, system=self.system))

    def _batch(self, example: Example) -> Batch:
        """One row of a bucketed shape, so that another question of another length compiles nothing new."""
        size = example.size
        window = Window(
            tiles=max(size.tiles, 1),
            visual=max(bucket(size.visual, VISUAL_BUCKET if size.visual > VISUAL_BUCKET else 1), 1),
            text=bucket(size.text, TEXT_BUCKET),
        )
        return make_prompt_batch([example], window, self.arch)

    def _program(self, *key_and_make: Any) -> Callable[..., Any]:
        *key, make = key_and_make
        if tuple(key) not in self._programs:
            self._programs[tuple(key)] = make()
        return self._programs[tuple(key)]

    def _prefix_program(self, routed: bool) -> Callable[..., Any]:
        num_viable = len(self.viable_budgets)
        function = partial(caches.prefill_prefix, num_viable=num_viable, arch=self.arch, routed=routed)
        return self._program("prefix", routed, lambda: jax.jit(function))

    def _rest_program(self, bits: Bits, capacity: int) -> Callable[..., Any]:
        function = partial(caches.prefill_rest, bits=bits, capacity=capacity, arch=self.arch)
        return self._program("rest", bits, capacity, lambda: jax.jit(function))

    def _step_program(self, bits: Bits) -> Callable[..., Any]:
        return self._program("step", bits, lambda: jax.jit(partial(caches.decode_step, bits=bits, arch=self.arch)))


def bucket(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def pixels(image: Picture) -> np.ndarray:
    """uint8 [H, W, 3] of a PIL image or an array."""
    array = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise RequestError(f"image: expected a PIL image or uint8 [H, W, 3], got {array.dtype} {array.shape}")
    return array


def usable(make: Callable[[], Example]) -> Example:
    """What `make` gives; a sample that cannot be used is the caller's mistake here."""
    try:
        return make()
    except SkipSample as why:
        raise RequestError(str(why)) from None


# --- loading ----------------------------------------------------------------------------------------------------------


def load(path: str | Path, plan: str | None = None, dtype: Any = None) -> Visor:
    """A model from a workdir (its newest complete stage), from one stage's folder, or from a Hugging Face folder.

    Args:
      path: a workdir, `WORKDIR/<stage>`, a LLaVA-OneVision checkpoint, or what `visor export` wrote.
      plan: "dense" or "visor"; None is the plan of what lies there. A dense checkpoint may be asked for as "visor": it
        is given new layers, as `visor import` does. Otherwise it must be the model's own plan.
      dtype: of the parameters; None is float32.

    Raises:
      RequestError: if there is no such model there, or it cannot have this plan.
    """
    path = as_path(path)  # a bucket's address keeps its "//"
    if plan not in (None, "dense", "visor"):
        raise RequestError(f"plan={plan!r}: expected 'dense' or 'visor'")
    if hf_import.is_folder(path):
        return load_checkpoint(path, plan, dtype)
    is_stage = path.name in MODEL_STAGES and not (path / "config.json").exists()  # a workdir may be called "full"
    workdir, stage = (Workdir(path.parent), path.name) if is_stage else (Workdir(path), None)
    if stage is None:
        stage = next((s for s in MODEL_STAGES if workdir.stage(s).is_complete()), None)
    if stage is None:
        raise RequestError(f"{path}: no complete stage; expected a workdir that `visor run` or `visor train` wrote")
    model = load_stage(workdir, stage, dtype)
    if plan is not None and plan != model.arch.plan:
        raise RequestError(f"plan={plan}: {path} holds a model of plan {model.arch.plan!r}")
    return model


def load_stage(workdir: Workdir, stage: str, dtype: Any = None) -> Visor:
    """The model that one complete stage of a workdir left."""
    config = configs.from_dict(workdir.config())
    arch = configs.architecture(config, stage)
    if not workdir.stage(stage).is_complete():
        raise RequestError(f"{workdir.stage(stage).path}: stage {stage!r} is not complete; run it first")
    params = restore_params(workdir.stage(stage).path / "checkpoints", abstract_params(arch))
    if dtype is not None:
        params = jax.tree.map(lambda x: x.astype(dtype), params)
    searched = (workdir.path / "search" / "viable.json").exists()
    viable = read_viable(workdir) if searched else [(False,) * arch.num_slots, (True,) * arch.num_slots]
    return Visor(
        params,
        arch,
        make_tokenizer(config),
        viable,
        system=config.tokenizer.system or None,
        has_policy=stage == "policy",
        stage=stage,
    )


def load_checkpoint(folder: Path, plan: str | None = None, dtype: Any = None) -> Visor:
    """A model from a folder in Hugging Face's format, on the first device."""
    checkpoint = hf_import.open_checkpoint(folder)
    tokenizer = load_tokenizer(folder)
    if plan == "dense" and checkpoint.arch.plan == "visor":
        raise RequestError(f"plan=dense: {folder} holds a model of plan 'visor'")
    hf_import.check(checkpoint)
    mesh = build_mesh(1, 1, 1, devices=jax.local_devices()[:1])
    params, arch = hf_import.read_params(checkpoint, mesh, dtype or jnp.float32), checkpoint.arch
    viable = checkpoint.viable_budgets
    if plan == "visor" and arch.plan == "dense":
        arch = dataclasses.replace(arch, plan="visor")
        params, _ = hf_import.made_visor(params, arch, mesh, jax.random.key(0))
        viable = [(False,) * arch.num_slots, (True,) * arch.num_slots]
    return Visor(
        params,
        arch,
        tokenizer,
        viable,
        system=checkpoint.system,
        has_policy=checkpoint.has_policy,
        stage=checkpoint.stage,
    )
