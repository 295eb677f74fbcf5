"""The fields of a configuration's sections `train` and `mesh`. No JAX import."""

from __future__ import annotations

from dataclasses import dataclass

from visor_jax.config.rules import (
    BUDGETS,
    CURRICULUM,
    MESH_SIZE,
    PATTERNS,
    RATES,
    WINDOW,
    above,
    at_least,
    below_one,
    one_of,
    within,
)
from visor_jax.config.values import setting


@dataclass(frozen=True)
class TrainConfig:
    """Training settings of a stage; `stage_overrides` changes them per stage."""

    steps: int = setting(1000, "number of optimizer steps", at_least(1), units="steps")
    objective: str = setting("answer", "training objective", one_of("answer", "policy"))
    batch_size: int = setting(
        0, "rows per optimizer step over all devices; 0 inherits data.batch_size", at_least(0), units="rows"
    )
    learning_rate: float = setting(0.001, "peak of the schedule", above(0))
    schedule: str = setting("cosine", "decay from the peak to the end", one_of("cosine", "linear", "constant"))
    warmup_fraction: float = setting(0.03, "fraction of the steps that warm up from 0 to the peak", within(0, 1))
    end_fraction: float = setting(0.0, "learning rate of the last step, as a fraction of the peak", within(0, 1))
    b1: float = setting(0.9, "Adam's decay of the mean", below_one())
    b2: float = setting(0.999, "Adam's decay of the variance", below_one())
    weight_decay: float = setting(0.0, "decoupled weight decay, as in AdamW", at_least(0))
    clip_norm: float = setting(1.0, "gradients are clipped to this global norm", above(0))
    trainable: tuple[str, ...] = setting(
        (".*",), "patterns matched at the start of parameter paths; other parameters are frozen", PATTERNS
    )
    group_rates: tuple[tuple[str, float], ...] = setting(
        (), "(pattern, learning rate multiplier) pairs; the first match applies", RATES
    )
    budgets: str = setting(
        "full",
        "the budget of every step (full, empty or bits such as 0b10), or the set that each step draws from (viable,"
        " subsets)",
        BUDGETS,
    )
    init_from: str = setting(
        "",
        "a stage, a path to another run's stage folder, or a checkpoint: almanac-base or a path to a folder in Hugging"
        " Face's format; empty: random weights",
    )
    curriculum: tuple[tuple[int, tuple[tuple[str, float], ...]], ...] = setting(
        (),
        "weights of the parts by phase: (steps done before, ((path in data.parts, weight), ...)); a part that is not"
        " named has weight 0; empty: the weights of data.parts",
        CURRICULUM,
    )
    label_balance: float = setting(
        0.0, "objective policy: 0 keeps label weights, 1 balances rare and common budgets", within(0, 4)
    )
    accumulate: int = setting(
        1, "parts that a batch is split into, one after the other, before one optimizer step: less memory", at_least(1)
    )
    remat: str = setting(
        "none",
        "activations that the backward pass recomputes: none, full (all), attention (all but attention's results),"
        " mlp (as attention, without MLPs and what feeds them), products (only norms and activations),"
        " offload (all, with the inputs of layers kept in the host's memory)",
        one_of("none", "full", "attention", "mlp", "products", "offload"),
        booleans=("none", "full"),
    )
    tower_remat: str = setting(
        "",
        "the same for the layers of the vision tower; empty: as remat",
        one_of("", "none", "full", "attention", "mlp", "products", "offload"),
    )
    moments_dtype: str = setting("float32", "dtype of Adam's mean of gradients", one_of("float32", "bfloat16"))
    ema_decay: float = setting(
        0.0, "decay per step of a moving average of the trained parameters, kept beside them; 0: none", below_one()
    )
    use_ema: bool = setting(False, "evaluation, later stages and exports use the average, not the last parameters")
    checkpoint_every: int = setting(500, "interval between checkpoints", at_least(1), units="steps")
    keep: int = setting(2, "checkpoints per stage kept on disk", at_least(1))
    max_bad_steps: int = setting(10, "consecutive steps with NaN or Inf before the run stops", at_least(1))
    hang_seconds: float = setting(
        1800.0, "time without a step before the watchdog aborts the process; 0: never", at_least(0), units="seconds"
    )

    validate_every: int = setting(
        0, "interval between validations, which also follow the last step; 0: never", at_least(0), units="steps"
    )
    validate_samples: int = setting(
        256, "held-out samples that a validation reads: the first of the validation split", at_least(1)
    )
    profile: str = setting("", "steps to trace for XProf, START:STEPS; empty: none", WINDOW)
    wandb_project: str = setting("", "Weights & Biases project that also gets the metrics; empty: none")


@dataclass(frozen=True)
class MeshConfig:
    """The device mesh."""

    replica: int = setting(1, "copies of the parameters in a slice", MESH_SIZE)
    fsdp: int = setting(-1, "devices of a slice that share the parameters", MESH_SIZE)
    tensor: int = setting(1, "devices that share each matrix product", MESH_SIZE)
    dcn_replica: int = setting(1, "groups of slices with a copy of the parameters each; -1: all slices", MESH_SIZE)
    max_unsharded: float = setting(
        0.02,
        "bytes of parameters and optimizer state that a device may hold above its share, as a fraction of the share",
        at_least(0),
    )
    dcn_fsdp: int = setting(1, "slices that share the parameters over the data center's network", MESH_SIZE)
