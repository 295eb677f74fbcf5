"""Import a Hugging Face checkpoint into a workdir, as the stage that training starts from.

A LLaVA-OneVision folder, or its name on the Hugging Face hub, becomes the stage `base` of a configuration of the same
shape (configs/llava_ov_*.py). model.plan=visor adds cross-attention, conditional position, gates and a policy, and
prints the new parameters. An export of a VISOR plan becomes the stage that it was exported from, a dense one `base`.
Every tensor's name, shape, dtype and values are checked before anything is written.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from visor_jax.config import Config

HELP = "import a Hugging Face checkpoint into a workdir"
CONFIG = "required"
WORKDIR = "required"
PROCESSES = "all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "--from",
        dest="source",
        metavar="DIR",
        required=True,
        help="the checkpoint's folder, ORG/NAME[@REVISION] on the hub, or a shipped one (almanac-base)",
    )


def main(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Imports the checkpoint; returns the stage and the numbers of parameters."""
    import jax

    from visor_jax.budget import bit_string
    from visor_jax.checkpoint.manager import Checkpoints
    from visor_jax.commands.recipe import held
    from visor_jax.config import architecture
    from visor_jax.data.from_config import make_tokenizer
    from visor_jax.errors import RequestError
    from visor_jax.files.read_write import as_path, write_json
    from visor_jax.hf.hub import local_folder
    from visor_jax.hf.model import add_visor_params, fitted
    from visor_jax.hf.origin import origin_of
    from visor_jax.hf.read import check, check_tokenizer, open_checkpoint, read_params
    from visor_jax.model.keys import start_key
    from visor_jax.scale.distributed import once
    from visor_jax.scale.mesh import configured_mesh
    from visor_jax.workdir.folder import Workdir

    source = as_path(local_folder(args.source))
    checkpoint = open_checkpoint(source)
    stage = checkpoint.stage if checkpoint.arch.plan == "visor" else "base"
    arch = architecture(config)  # also of `base`, which is dense only where it is trained
    checkpoint = fitted(checkpoint, arch, f"--from={args.source}")
    workdir = Workdir(args.workdir)
    folder = workdir.stage(stage)
    if once(folder.is_complete):
        raise RequestError(f"{folder.path}: is complete already; expected another --workdir")
    try:
        tokenizer = make_tokenizer(config)
    except RequestError as error:
        file = source / "tokenizer.json"
        raise RequestError(f"{error}; the checkpoint's own is --config.tokenizer.path={file}") from None
    check_tokenizer(checkpoint, tokenizer)
    check(checkpoint)
    if not config.model.text.max_positions:
        text = dataclasses.replace(config.model.text, max_positions=checkpoint.arch.text.max_positions)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, text=text))
    once(workdir.create)
    with held(workdir, config):
        mesh = configured_mesh(config)
        params, new = read_params(checkpoint, mesh), dict[str, int]()
        if arch.plan != checkpoint.arch.plan:
            params, new = add_visor_params(params, arch, mesh, start_key(config.seed, stage))
        if checkpoint.viable_budgets:
            names = [bit_string(bits) for bits in checkpoint.viable_budgets]
            result = {"num_slots": arch.num_slots, "viable": names, "subsets": []}
            once(lambda: write_json(workdir.path / "search" / "viable.json", result))
        identity = workdir.identity(config, stage)
        largest = max(x.nbytes for x in jax.tree.leaves(params))
        place = folder.path / "checkpoints"
        with Checkpoints(place, identity=identity, keep=1, copied_bytes=largest) as checkpoints:
            checkpoints.save(0, {"params": params}, meta={"step": 0}, wait=True)
        once(lambda: folder.mark_complete({"step": 0, "imported": True, "origin": origin_of(Path(source))}))
    total, added = sum(x.size for x in jax.tree.leaves(params)), sum(new.values())
    print(f"{folder.path}: {total - added:,} parameters from {args.source}")
    for part, count in new.items():
        print(f"  new: {part}, {count:,}")
    if new:
        print(f"new parameters: {added:,}, {100 * added / (total - added):.1f} % on top")
    return {"stage": stage, "parameters": total, "new_parameters": added, "new": new}
