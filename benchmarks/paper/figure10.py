"""Figure 10: decoder FLOPs against the number of visual tokens, by formula."""

import functools

from visor_jax.analysis import lengths
from visor_jax.analysis.base import Run
from visor_jax.budget import budget_name
from visor_jax.config import architecture, load_config

from .base import Cells, Column, Entry, Row, Settings
from .runs import BASES, DOWNLOAD

TOKENS = (729, 1458, 2916, 5832, 7290, 11664, 23328)
COLUMNS = {"empty": 0, "two": 2, "full": None}  # slots on; None: all


@functools.cache
def savings(config: str, heads: int = 0) -> Cells:
    """Returns the savings of a configuration's adaptive plan for every number of visual tokens."""
    arch = architecture(load_config(config, [f"--config.model.cross.num_kv_heads={heads}"]))
    bits = {
        key: tuple(n < (arch.num_slots if on is None else on) for n in range(arch.num_slots))
        for key, on in COLUMNS.items()
    }
    table = lengths.rows(Run(arch, tuple(dict.fromkeys(bits.values()))))
    flops = {(row["visual_tokens"], row["budget"]): row["decoder_gflops"] for row in table}
    return {
        str(tokens): {key: flops[tokens, "dense"] / flops[tokens, budget_name(of)] for key, of in bits.items()}
        for tokens in TOKENS
    }


class SmallPlan:
    """The same of the embedded data set's model: by formula, nothing is run."""

    def commands(self, settings: Settings) -> list[str]:
        """Returns no command."""
        return []

    def run(self, settings: Settings) -> None:
        """Does nothing: there is nothing to measure."""

    def read(self, settings: Settings) -> Cells:
        """Returns the savings, which do not depend on the training."""
        return savings("almanac_mini")


class Lengths:
    """The command that draws the figure for a checkpoint."""

    def commands(self) -> list[str]:
        """Returns the command."""
        base = BASES["0.5B"]
        config = f"--config=configs/{base.config}.py:$HF_DIR/tokenizer.json"
        config += f" --config.model.cross.num_kv_heads={base.heads}"
        return [DOWNLOAD, f"visor analyze --model=$HF_DIR {config} --only=lengths --out=$RUNS/analysis"]

    def files(self) -> list[str]:
        """Returns no file: the formula has all numbers."""
        return []

    def read(self, runs: object) -> Cells:
        """Returns no number: the formula has them all."""
        return {}


ENTRY = Entry(
    name="figure10",
    title="Figure 10: decoder FLOPs against visual tokens",
    columns=(
        Column("empty", "no slot", suffix="x"),
        Column("two", "two slots", suffix="x"),
        Column("full", "all slots", suffix="x"),
    ),
    rows=tuple(Row(str(tokens), f"{tokens:,} visual tokens") for tokens in TOKENS),
    paper=Lengths(),
    small=SmallPlan(),
    formula=lambda: savings(BASES["0.5B"].config, BASES["0.5B"].heads),
    about=(
        "Savings against the dense plan on as many tokens, with 80 text tokens, and as many key and"
        " value heads of cross-attention as query heads. The paper's numbers are not known here."
        " The model of the embedded data set has two slots, so its last two columns are one."
    ),
)
