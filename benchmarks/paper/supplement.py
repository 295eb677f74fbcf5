"""The supplement: other base models, and how many parameters the new layers have."""

import dataclasses

from .base import ACCURACY, SAVING, Cells, Column, Entry, Nothing, Row
from .runs import BASES, Base, Evaluated, places
from .savings import TWO_SLOTS, saving

PERCENT = Column("added", "added parameters, % of the decoder's layers")


def added_parameters(base: Base) -> float:
    """Returns the parameters that VISOR adds to the decoder's layers, in percent of what these have, without a run."""
    from visor_jax.config import architecture, load_config
    from visor_jax.model.visor import abstract_params
    from visor_jax.tree import flatten

    arch = architecture(load_config(base.config, [f"--config.model.cross.num_kv_heads={base.heads}"]))
    dense = flatten(abstract_params(dataclasses.replace(arch, plan="dense")))
    layers = {path: x.size for path, x in flatten(abstract_params(arch)).items() if path.startswith("blocks/")}
    new = sum(size for path, size in layers.items() if path not in dense)
    return 100 * new / sum(size for path, size in layers.items() if path in dense)


def formula() -> Cells:
    """Returns the savings with two slots on, and the added parameters."""
    return {
        "0p5b": {"saving": saving("visor", TWO_SLOTS), "added": added_parameters(BASES["0.5B"])},
        "1p5b": {"saving": saving("visor_1p5b", "0b110000000"), "added": added_parameters(BASES["1.5B"])},
    }


ENTRY = Entry(
    name="supplement",
    title="Supplement: other base models",
    columns=(*ACCURACY, SAVING, PERCENT),
    rows=(
        Row("0p5b_dense", "LLaVA-OneVision-0.5B, dense", {"easy": 61.5, "hard": 57.1, "saving": 1.0}),
        Row("0p5b", "VISOR on it", {"easy": 63.6, "hard": 58.4, "saving": "8.6-8.9x", "added": 7.5}),
        Row("1p5b_dense", "LLaVA-OneVision-1.5B, dense"),
        Row("1p5b", "VISOR on it"),
        Row("qwen2_vl_2b_dense", "Qwen2-VL-2B, dense"),
        Row("qwen2_vl_2b", "VISOR on it"),
    ),
    paper=Evaluated(
        {
            "0p5b_dense": places("dense", "full"),
            "0p5b": places("visor", "auto"),
            "1p5b_dense": places("dense_1p5b", "full"),
            "1p5b": places("visor_1p5b", "auto"),
        }
    ),
    small=Nothing(),
    formula=formula,
    about=(
        "The paper reports LLaVA-OneVision-1.5B and Qwen2-VL-2B as bases; their numbers, and in which tables they"
        " stand, are not known here. This package has no Qwen2-VL, so those rows have no command. HF_1P5B is a"
        " checkpoint of LLaVA-OneVision's format with Qwen2-1.5B. Savings of ours are with two slots on, and as many"
        " key and value heads in cross-attention as query heads; with these, the new layers have the paper's number of"
        " parameters about, if it counts them against the decoder's layers without embeddings. The package ships one"
        " dense base, so there is nothing to run on the embedded data set."
    ),
)
