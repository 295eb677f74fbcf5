"""Ask about a picture, several or none: the answer, and a receipt of what it cost.

`--workdir` takes a trained run, `--model` that or a folder in Hugging Face's format. `--image` may be given several
times, or not at all. `--budget=auto` lets the policy choose; `empty`, `full`, a number of slots or the pattern of a
viable budget such as `0b100` fix it; `--dial` shifts the policy between cheaper (below 0) and more accurate (above 0).
`--temperature` above 0 draws tokens instead of taking the best; the same `--seed` draws the same answer. `--stream`
prints the answer while it comes.

`--history=FILE.json` holds the turns before the question: [["a question", "its answer"], ...]. `--chat` goes on asking:
each line of stdin is a question that follows on what was said, an empty line or Ctrl-D ends, Ctrl-C stops an answer;
/help lists what else may be typed. With `--json` a chat prints one object for each answer.
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
    parser.add_argument(
        "--model",
        metavar="DIR",
        default="",
        help="a run's folder, a stage of one, a Hugging Face folder, or ORG/NAME on its hub",
    )
    parser.add_argument(
        "--image", metavar="FILE", action="append", default=[], help="a JPEG, PNG, WebP or GIF file; may be given again"
    )
    parser.add_argument("--question", metavar="TEXT", help="what to ask; with --chat the first question")
    parser.add_argument("--history", metavar="FILE", default="", help='earlier turns: [["question", "answer"], ...]')
    parser.add_argument("--chat", action="store_true", help="go on asking: one question a line of stdin")
    parser.add_argument("--budget", default="auto", help="auto, full, empty, a number of slots, or bits such as 0b100")
    parser.add_argument("--dial", type=float, default=0.0, help="the policy: below 0 cheaper, above 0 more accurate")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the best token, above 0 draws")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the best tokens of this probability")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--stream", action="store_true", help="print the answer while it comes")


def main(args: argparse.Namespace, config: Any) -> dict[str, Any] | Iterator[dict[str, Any]]:
    del config
    from visor_jax.budget import Budget
    from visor_jax.errors import RequestError
    from visor_jax.generate.request import Request, checked_question, pixels
    from visor_jax.generate.sampling import Sampling

    if bool(args.workdir) == bool(args.model):
        raise RequestError("generate: expected one of --workdir=DIR and --model=DIR")
    question: str | None = args.question
    if question is None and not args.chat:
        raise RequestError("generate: --question is missing; expected --question=TEXT, or --chat to type questions")
    # What can be refused at once is refused before a model is loaded.
    if question is not None:
        checked_question(question)
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
    Request(None, args.dial, args.max_new_tokens, Sampling(**sampling), frozenset())
    budget, history = Budget.parse(args.budget), read_history(args.history)
    pictures = [pixels(name, f"--image={name}") for name in args.image]

    from visor_jax.scale.compiler_options import use_compile_cache

    use_compile_cache(min_seconds=0)  # the same question again compiles nothing at all
    from visor_jax.loading import load

    model = load(args.workdir or args.model)
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
    """The turns that a file holds; none where no file is named."""
    from visor_jax.errors import RequestError
    from visor_jax.files.read_write import as_path, read_json
    from visor_jax.generate.request import checked_history

    if not name:
        return []
    found = read_json(as_path(name))
    try:
        return checked_history(found)
    except RequestError as error:
        raise RequestError(f"--history={name}: {error}") from None


def receipt(answer: Answer) -> str:
    """What an answer cost, on one line."""
    return (
        f"budget {answer.budget}; {answer.flops / 1e9:.4f} GFLOP ({answer.decoder_flops / 1e9:.4f} in the decoder); "
        f"{answer.cache_bytes} bytes of cache; first token after {answer.seconds_to_first_token:.2f} s, "
        f"all after {answer.seconds:.2f} s; {answer.seconds_compiling:.2f} s of compilation before"
    )
