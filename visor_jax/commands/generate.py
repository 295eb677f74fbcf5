"""Ask one question about one picture: the answer, and a receipt of what it cost.

`--workdir` takes a trained run. `--budget=auto` lets the policy choose; `empty`, `full`, a number of slots or a pattern
such as `0b100` fix it; `--dial` shifts the policy between cheaper (below 0) and more accurate (above 0).
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

HELP = "answer a question about a picture"
CONFIG = "none"
MAX_PIXELS = 89_478_485  # Pillow's own limit; larger pictures are refused before they are decoded


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="", help="a trained run's folder or one of its stages; the same as --workdir"
    )
    parser.add_argument("--image", required=True, help="a JPEG, PNG or WebP file")
    parser.add_argument("--question", required=True)
    parser.add_argument("--budget", default="auto")
    parser.add_argument("--dial", type=float, default=0.0)
    parser.add_argument("--max-new-tokens", type=int, default=64)


def main(args: argparse.Namespace, config: Any) -> dict[str, Any]:
    del config
    from visor_jax.api import load
    from visor_jax.data.images import read_image
    from visor_jax.data.sample import SkipSample
    from visor_jax.errors import RequestError

    if bool(args.workdir) == bool(args.model):
        raise RequestError("generate: expected one of --workdir=DIR and --model=DIR")
    try:
        image = read_image(Path(args.image), MAX_PIXELS, args.image)
    except SkipSample as why:
        raise RequestError(f"--image={args.image}: {why}") from None
    answer = load(args.workdir or args.model).answer(
        image, args.question, args.budget, max_new_tokens=args.max_new_tokens, dial=args.dial
    )
    print(answer.text)
    print(
        f"budget {answer.budget}; {answer.flops / 1e9:.4f} GFLOP ({answer.decoder_flops / 1e9:.4f} in the decoder); "
        f"{answer.cache_bytes} bytes of cache; first token after {answer.seconds_to_first_token:.2f} s"
    )
    return dataclasses.asdict(answer)
