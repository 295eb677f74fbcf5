"""Ask one question about one picture: the answer, and a receipt of what it cost.

`--workdir` takes a trained run, `--model` that or a folder in Hugging Face's format. `--budget=auto` lets the policy
choose; `empty`, `full`, a number of slots or the pattern of a viable budget such as `0b100` fix it; `--dial` shifts the
policy between cheaper (below 0) and more accurate (above 0). `--temperature` above 0 draws tokens instead of taking the
best; the same `--seed` draws the same answer. `--stream` prints the answer while it comes.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

HELP = "answer a question about a picture"
CONFIG = "none"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="DIR",
        default="",
        help="a run's folder, a stage of one, a Hugging Face folder, or ORG/NAME there",
    )
    parser.add_argument("--image", metavar="FILE", required=True, help="a JPEG, PNG or WebP file")
    parser.add_argument("--question", metavar="TEXT", required=True)
    parser.add_argument("--budget", default="auto", help="auto, full, empty, a number of slots, or bits such as 0b100")
    parser.add_argument("--dial", type=float, default=0.0, help="the policy: below 0 cheaper, above 0 more accurate")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the best token, above 0 draws")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the best tokens of this probability")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--stream", action="store_true", help="print the answer while it comes")


def main(args: argparse.Namespace, config: Any) -> dict[str, Any]:
    del config
    from visor_jax.budget import Budget
    from visor_jax.errors import RequestError
    from visor_jax.generate.request import Request, checked_question
    from visor_jax.generate.sampling import Sampling

    if bool(args.workdir) == bool(args.model):
        raise RequestError("generate: expected one of --workdir=DIR and --model=DIR")
    # What can be refused at once is refused before a model is loaded.
    question, budget = checked_question(args.question), Budget.parse(args.budget)
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
    Request(None, args.dial, args.max_new_tokens, Sampling(**sampling), frozenset())
    image = picture(args.image)

    from visor_jax.api import load

    settings = {"max_new_tokens": args.max_new_tokens, "dial": args.dial, **sampling}
    stream = load(args.workdir or args.model).stream(image, question, budget, **settings)
    if args.stream:
        for piece in stream:
            print(piece, end="", flush=True)
    answer = stream.answer
    print("" if args.stream else answer.text)
    print(
        f"budget {answer.budget}; {answer.flops / 1e9:.4f} GFLOP ({answer.decoder_flops / 1e9:.4f} in the decoder); "
        f"{answer.cache_bytes} bytes of cache; first token after {answer.seconds_to_first_token:.2f} s, "
        f"all after {answer.seconds:.2f} s"
    )
    return dataclasses.asdict(answer)


def picture(name: str) -> np.ndarray:
    """uint8 [H, W, 3] of the file that the user named."""
    from visor_jax.config_schema import MAX_PIXELS
    from visor_jax.data.images import FORMATS, read_image
    from visor_jax.data.sample import SkipSample
    from visor_jax.errors import RequestError

    try:
        return read_image(Path(name), MAX_PIXELS, name)
    except SkipSample as why:
        expected = f"expected a {', '.join(FORMATS)} file of at most {MAX_PIXELS:,} pixels"
        raise RequestError(f"--image={name}: {why}; {expected}") from None
