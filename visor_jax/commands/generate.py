"""Answer a question about one picture, several or none, and print the cost of the answer.

`--workdir` is a trained run, `--model` a run or a folder in Hugging Face's format. `--image` and `--video`
may be repeated or omitted; videos come after pictures. `--budget=auto` lets the policy choose; `empty`, `full`, a
number of slots or the pattern of a viable budget such as `0b10` fix it; `--dial` shifts the policy between cheaper
(below 0) and more accurate (above 0).
`--temperature` above 0 samples tokens instead of taking the best; the same `--seed` gives the same answer. `--stream`
prints the answer as it is generated.

`--history=FILE.json` holds the earlier turns: [["a question", "its answer"], ...]. `--chat` continues the conversation:
each line of stdin is a question, an empty line or Ctrl-D ends, Ctrl-C stops an answer; /help lists more commands. With
`--json` a chat prints one object per answer.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visor_jax.generate.answer import Answer

HELP = "answer questions about pictures"
CONFIG = "none"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "--model",
        metavar="DIR",
        default="",
        help="a run's folder, a stage of one, a Hugging Face folder, or ORG/NAME on its hub",
    )
    parser.add_argument(
        "--image", metavar="FILE", action="append", default=[], help="a JPEG, PNG, WebP or GIF file; may be repeated"
    )
    parser.add_argument(
        "--video",
        metavar="FILE",
        action="append",
        default=[],
        help="a folder of frames, an animated WebP or GIF, an .npy array, or an MP4 file; may be repeated",
    )
    parser.add_argument("--max-frames", type=int, default=32, help="frames used of one video, evenly spaced")
    parser.add_argument("--question", metavar="TEXT", help="the question; with --chat the first one")
    parser.add_argument("--history", metavar="FILE", default="", help='earlier turns: [["question", "answer"], ...]')
    parser.add_argument("--chat", action="store_true", help="continue with one question per line of stdin")
    parser.add_argument("--budget", default="auto", help="auto, full, empty, a number of slots, or bits such as 0b10")
    parser.add_argument("--dial", type=float, default=0.0, help="the policy: below 0 cheaper, above 0 more accurate")
    parser.add_argument(
        "--ratio", type=float, default=None, help="share of the visual tokens, one of model.reduction.scales"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the best token, above 0 samples")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the best tokens of this probability")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--stream", action="store_true", help="print the answer as it is generated")


def main(args: argparse.Namespace, config: None) -> dict[str, Any] | Iterator[dict[str, Any]]:
    """Answers; returns the fields of `Answer`, or an iterator over the answers of a chat."""
    del config
    from visor_jax.budget import Budget
    from visor_jax.errors import RequestError
    from visor_jax.generate.request import Request, checked_question, pixels, video_frames
    from visor_jax.generate.sampling import Sampling

    if bool(args.workdir) == bool(args.model):
        raise RequestError("generate: expected one of --workdir=DIR and --model=DIR")
    question: str | None = args.question
    if question is None and not args.chat:
        raise RequestError("generate: --question is missing; expected --question=TEXT, or --chat to type questions")
    # Validate everything possible before loading the model.
    if question is not None:
        checked_question(question)
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
    Request(None, args.dial, args.max_new_tokens, Sampling(**sampling), frozenset())
    budget, history = Budget.parse(args.budget), read_history(args.history)
    pictures = [pixels(name, f"--image={name}") for name in args.image]
    pictures += [video_frames(name, args.max_frames, f"--video={name}") for name in args.video]

    from visor_jax.scale.compiler_options import use_compile_cache

    use_compile_cache(min_seconds=0)  # repeating a question then compiles nothing
    from visor_jax.loading import load

    model = load(args.workdir or args.model)
    model = model if args.ratio is None else model.at_ratio(args.ratio)
    settings = {"max_new_tokens": args.max_new_tokens, "dial": args.dial, **sampling}
    if args.chat or question is None:
        from visor_jax.commands.chat import Chat

        return Chat(model, pictures, history, budget, settings, quiet=args.json).run(question)
    stream = model.stream(pictures, question, budget, history=history, **settings)
    if args.stream:
        for piece in stream:
            print(piece, end="", flush=True)
    answer = stream.answer
    print("" if args.stream else answer.text)
    print(receipt(answer))
    return dataclasses.asdict(answer)


def read_history(name: str) -> list[tuple[str, str]]:
    """Reads the turns in a file; [] for an empty name."""
    from visor_jax.errors import RequestError
    from visor_jax.files.read_write import as_path, read_json
    from visor_jax.generate.request import checked_history

    if not name:
        return []
    turns = read_json(as_path(name))
    try:
        return checked_history(turns)
    except RequestError as error:
        raise RequestError(f"--history={name}: {error}") from None


def receipt(answer: Answer) -> str:
    """Describes the cost of an answer in one line."""
    return (
        f"budget {answer.budget}; {answer.flops / 1e9:.4f} GFLOP ({answer.decoder_flops / 1e9:.4f} in the decoder); "
        f"{answer.cache_bytes} bytes of cache; first token after {answer.seconds_to_first_token:.2f} s, "
        f"all after {answer.seconds:.2f} s; {answer.seconds_compiling:.2f} s of compilation before"
    )
