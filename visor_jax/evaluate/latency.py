"""Measures times under each budget: of a prompt's prefill, and of a whole answer.

`compare_budgets` compiles one prefill program per budget. The time ends with the logits of the first new token; it
includes filling the cache but not the vision tower. Budgets run in random order within each round, and speedups over
the costliest budget are computed per round, so that changes of the machine's load affect all budgets alike.

`time_answers` times what a user waits for: the first token, with vision tower and routing, and the speed of the tokens
after it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from visor_jax.architecture import Architecture
from visor_jax.budget import Bits, budget_name
from visor_jax.cost import decoder_flops
from visor_jax.generate.answer import Answer
from visor_jax.model.decoder import unstack_layers
from visor_jax.model.incremental import prefill_prefix, prefill_rest
from visor_jax.model.layers import Params
from visor_jax.scale import compiler_options as compiling
from visor_jax.workdir.supervision import beat

NEW_TOKENS = 32  # of a timed answer, past its end
QUARTILES = (25, 50, 75)
Timed = Callable[[Bits | None, int], Answer]  # (bits, None: the policy decides; number of new tokens) -> answer


def random_prompt(arch: Architecture, visual: int, text: int, dtype: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns V [1, visual, D] and a batch of one prompt of `text` tokens after it."""
    positions = np.arange(visual + text, dtype=np.int32)[None]
    ones = np.ones_like(positions)
    batch = {
        "visual_positions": positions[:, :visual],
        "visual_segments": ones[:, :visual],
        "text_positions": positions[:, visual:],
        "text_segments": ones[:, visual:],
        "text_tokens": np.full((1, text), min(7, arch.text.vocab_size - 1), np.int32),
        "routing_position": np.array([visual + text], np.int32),
    }
    tokens = jax.random.normal(jax.random.key(1), (1, visual, arch.text.hidden_size), dtype)
    return tokens, jax.tree.map(jnp.asarray, batch)


def prefill_program(
    params: Params, arch: Architecture, bits: Bits, prompt: tuple[jax.Array, Mapping[str, jax.Array]]
) -> Callable[[], Any]:
    """Compiles one prefill and returns a function that runs it to its end; `params` are unstacked."""
    tokens, batch = prompt
    text = batch["text_tokens"].shape[1]

    def prefill(params, tokens, batch):
        prefix, _ = prefill_prefix(params, tokens, batch, 1, arch, routed=False)
        return prefill_rest(params, prefix, batch, bits, text, arch)

    options = compiling.options(params)
    compiled = jax.jit(prefill, compiler_options=options).lower(params, tokens, dict(batch)).compile()

    return lambda: jax.block_until_ready(compiled(params, tokens, dict(batch)))


def seconds(run: Callable[[], Any]) -> float:
    """Times one call of `run`, until its result is ready."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def compare_budgets(
    params: Params, arch: Architecture, budgets: Sequence[Bits], *, visual: int, text: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """Maps budget name -> seconds, speedup over the costliest budget (quartiles over rounds), decoder GFLOPs."""
    prompt = random_prompt(arch, visual, text, params["embed_tokens"]["embedding"].dtype)
    unstacked = unstack_layers(params)
    programs = [prefill_program(unstacked, arch, bits, prompt) for bits in budgets]
    for program in programs:
        program()
    measured, order = np.zeros((rounds, len(budgets))), random.Random(0)
    for row in measured:
        for index in order.sample(range(len(budgets)), len(budgets)):
            row[index] = seconds(programs[index])
    flops = [decoder_flops(arch, bits, visual, text) for bits in budgets]
    slowest = measured[:, int(np.argmax(flops))]
    return {
        "dense" if arch.plan == "dense" else budget_name(bits): {
            "seconds": np.percentile(measured[:, index], QUARTILES).tolist(),
            "times_faster": np.percentile(slowest / measured[:, index], QUARTILES).tolist(),
            "decoder_gflops": flops[index] / 1e9,
        }
        for index, bits in enumerate(budgets)
    }


def time_answers(answer: Timed, budgets: Mapping[str, Bits | None], *, room: int, rounds: int) -> dict[str, Any]:
    """Times the answers to one question under each budget, on this process's first device.

    One answer of each budget before the first round compiles its programs and is not counted.

    Args:
      answer: answers the question (`Visor.timed_answer`).
      budgets: name -> bits.
      room: positions that the question leaves for new tokens.
      rounds: of all budgets in random order.

    Returns:
      {"device", "rounds", "new_tokens", "budgets": {name: {"route", "seconds_to_first_token", "tokens_per_second"}}},
      both times as quartiles; None for the speed of tokens if there is no room for a second one.
    """
    tokens, order = min(NEW_TOKENS, room), random.Random(0)
    routes = {name: answer(bits, tokens).budget for name, bits in budgets.items()}
    timed: dict[str, list[Answer]] = {name: [] for name in budgets}
    for _ in range(rounds):
        for name in order.sample(list(budgets), len(budgets)):
            beat()
            timed[name].append(answer(budgets[name], tokens))
    rows = {}
    for name, answers in timed.items():
        first = np.array([one.seconds_to_first_token for one in answers])
        rest = np.array([one.seconds for one in answers]) - first
        speed = np.percentile((tokens - 1) / rest, QUARTILES).tolist() if tokens > 1 else None
        seconds_to_first = np.percentile(first, QUARTILES).tolist()
        rows[name] = {"route": routes[name], "seconds_to_first_token": seconds_to_first, "tokens_per_second": speed}
    return {"device": jax.devices()[0].device_kind, "rounds": rounds, "new_tokens": tokens, "budgets": rows}


def median_place(sizes: Sequence[int]) -> int:
    """Returns the place of the median of sizes, of two the smaller one."""
    return sorted(range(len(sizes)), key=lambda place: sizes[place])[(len(sizes) - 1) // 2]
