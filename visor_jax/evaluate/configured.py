"""The model of a run as the command line changes it: another dtype, system text, or fewer visual tokens.

In: a loaded model, the configuration that its run was trained with, and the one to evaluate with. Out: the model with
what needs no training changed. So `visor evaluate --config.model.reduction.method=vispruner` asks a model about the
tokens that VisPruner keeps, whatever it was trained on.
"""

from __future__ import annotations

import copy
import dataclasses

from visor_jax.config import Config, architecture
from visor_jax.errors import RequestError
from visor_jax.generate.visor import Visor
from visor_jax.model.layers import in_dtype
from visor_jax.workdir.provenance import differing_fields, plain

TOKENS = ("model.reduction.", "model.dropping.", "model.anyres.packing")
FREE = (*TOKENS, "model.dtype", "tokenizer.system")  # fields that belong to no parameter


def configured(model: Visor, trained: Config, config: Config) -> Visor:
    """Returns the model as `config` has it, which differs from the configuration that its run was trained with.

    Parameters remain in their dtype: that of the activations is `config.model.dtype` (`in_dtype_of`).

    Raises:
      RequestError: a field of `model` differs that belongs to the parameters.
    """
    changed = [name for name, *_ in differing_fields(plain(trained), plain(config))]
    same_plan = config.model.plan == model.arch.plan  # that of a stage may be another one than the run's
    for name in changed:
        free = name.startswith(FREE) or (name == "model.plan" and same_plan)
        if name.startswith(("model.", "tokenizer.")) and not free:
            raise RequestError(
                f"--config.{name}: differs from the configuration of {model.source}, whose parameters belong to it;"
                f" expected no field of model and tokenizer but {', '.join(field.removesuffix('.') for field in FREE)}"
            )
    if "shuffle" in (trained.model.anyres.packing_kind, config.model.anyres.packing_kind) and any(
        name.startswith("model.anyres.packing") for name in changed
    ):
        raise RequestError(
            f"--config.model.anyres.packing: the connector of packing_kind=shuffle is as wide as {model.source} was"
            " trained for; expected the packing of its configuration"
        )
    if any(name.startswith(TOKENS) for name in changed):
        model = with_tokens_of(model, config)
    if "tokenizer.system" in changed:
        model = with_system(model, config.tokenizer.system)
    return model


def with_system(model: Visor, system: str) -> Visor:
    """Returns the model with another system text; "" is none."""
    model = copy.copy(model)
    model.system = system or None
    return model


def with_tokens_of(model: Visor, config: Config) -> Visor:
    """Returns a model that reads the visual tokens which `config` leaves."""
    chosen = architecture(config, model.stage)
    packing = {name: getattr(chosen.anyres, name) for name in ("packing", "packing_kind")}
    anyres = dataclasses.replace(model.arch.anyres, **packing)
    arch = dataclasses.replace(model.arch, reduction=chosen.reduction, dropping=chosen.dropping, anyres=anyres)
    changed = model.with_arch(arch)
    changed.fingerprint = model.fingerprint  # of the parameters
    return changed


def in_dtype_of(config: Config, model: Visor) -> Visor:
    """Returns the model with parameters in the dtype that it is scored in."""
    dtype = config.model.dtype
    return model if model.dtype == dtype else model.with_params(in_dtype(model.params, dtype))
