"""Overrides of single fields: the values that they become, and the messages with which they are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.config.overrides import changed, refused
from visor_jax.config import from_json, to_json
from visor_jax.config.rules import parse_grids
from visor_jax.config.schema import SCHEMA, STAGES, all_names
from visor_jax.errors import RequestError, nearest


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stepz=3", "train.stepz=3: unknown field; did you mean 'train.steps'?"),
        ("steps=3", "steps=3: unknown field; did you mean 'train.steps'?"),
        ("trian.x=3", "trian.x=3: unknown field; did you mean 'train'?"),
        ("stage_overrides.warmup.stps=3", "did you mean 'stage_overrides.warmup.steps'?"),
        ("stage_overrides.fulll.steps=3", "did you mean 'full'?"),
        ("train.lr=3", "train.lr=3: unknown field; train has steps, objective,"),
        ("train=3", "train=3: unknown field; it is a section with steps, objective,"),
        ("qqqqq=3", "qqqqq=3: unknown field; the top-level names are name, seed, stage,"),
        ("train.steps=ten", "train.steps=ten: expected a whole number"),
        ("train.steps=1.5", "train.steps=1.5: expected a whole number"),
        ("train.steps=0", "train.steps=0: expected a number of at least 1"),
        ("train.steps=-5", "train.steps=-5: expected a number of at least 1"),
        ("stage_overrides.full.steps=0", "stage_overrides.full.steps=0: expected a number of at least 1"),
        ("train.learning_rate=nan", "train.learning_rate=nan: expected a finite number"),
        ("train.learning_rate=inf", "train.learning_rate=inf: expected a finite number"),
        ("train.learning_rate=-1", "train.learning_rate=-1: expected a number above 0"),
        (
            "train.remat=maybe",
            "train.remat=maybe: expected one of 'none', 'full', 'attention', 'mlp', 'products', 'offload'",
        ),
        ("train.profile=10", "train.profile=10: expected START:STEPS, such as '10:3'"),
        ("train.profile=0:3", "train.profile=0:3: expected START:STEPS"),
        ("train.validate_every=-1", "train.validate_every=-1: expected a number of at least 0"),
        ("train.schedule=cosin", "one of 'cosine', 'linear', 'constant'; did you mean 'cosine'?"),
        ("stage=warmpu", "did you mean 'warmup'?"),
        ("stages=full,warmup", "expected different stages in the order"),
        ("stages=full,full", "expected different stages in the order"),
        ("stages=base,fine", "expected different stages in the order"),
        ("data.text_length=0", "data.text_length=0: expected a number of at least 1"),
        ("train.trainable=(", "regular expressions"),
        ("train.trainable=", "regular expressions"),
        ("train.group_rates=3", "expected a list of pairs (text, a number)"),
        ('train.group_rates=(("vision/", -1),)', "multiplier of at least 0"),
        ("model.anyres.image_std=0,1,1", "three numbers above 0"),
        ("model.anyres.pinpoints=(1x1),...", "grids of tiles"),
        ("model.anyres.pinpoints=(0x1)", "grids of tiles"),
        ("evaluate.dials=0,nan", "expected a finite number"),
        ("seed=-1", "seed=-1: expected a whole number from 0"),
        ("train.steps", "--config.train.steps: expected --config.train.steps=VALUE"),
        ("name=a\nb\nunknown", None),
        ("nam=a\nb", "nam='a\\nb': unknown field"),
    ],
)
def test_overrides_that_make_no_sense(override, expected):
    if expected is None:
        assert changed(override).name == override.removeprefix("name=")
    else:
        assert expected in refused(override)


DROPPING = (
    "model.plan=dense",
    "stages=dense",
    "model.dropping.method=pyramiddrop",
    "model.dropping.layers=2,4",
    "model.dropping.ratios=0.5,0.25",
)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.text.num_layers=2"], "model.text.num_layers=2: expected at least 3"),
        (["model.pattern=text,crss,self"], "model.pattern=('text', 'crss', 'self'): 'crss' is not a layer kind"),
        (["model.pattern=text,crss,self"], "did you mean 'cross'?"),
        (["model.pattern=text,self"], "model.pattern=('text', 'self'): expected at least one 'cross'"),
        (["model.pattern=text,cross"], "model.pattern=('text', 'cross'): expected at least one 'self'"),
        (["model.pattern="], "model.pattern=(): expected at least one 'cross'"),
        (
            ["model.pattern=self,cross,text"],
            "the stage 'policy' reads the question in the layers before the first slot",
        ),
        (["model.head_layers=10"], "model.head_layers=10: expected at most model.text.num_layers=9"),
        (["model.head_layers=7"], "model.text.num_layers=9: expected at least 10 with model.plan='visor'"),
        (["model.pattern=" + "text," * 8 + "cross,self"], "model.text.num_layers=9: expected at least 10"),
        (["model.text.num_layers=195"], "gives 65 slots with model.text.num_layers=195; expected at most 64"),
        (["model.text.num_heads=6"], "model.text.num_kv_heads=4: expected a divisor of model.text.num_heads=6"),
        (["model.text.head_dim=15"], "model.text.head_dim=15: expected an even number"),
        (["model.cross.num_kv_heads=3"], "model.cross.num_kv_heads=3: expected a divisor"),
        (["model.cross.num_kv_heads=2"], "model.cross.num_kv_heads=2: expected at least 4"),
        (["model.cross.kernel_size=6"], "model.cross.kernel_size=6: expected an odd number"),
        (["model.text.num_heads=16777216"], "model.text.num_heads=16777216: expected a number from 1 to 1024"),
        (["model.vision.num_heads=7"], "model.vision.num_heads=7: expected a divisor of model.vision.hidden_size=96"),
        (["model.vision.patch_size=100"], "model.vision.patch_size=100: expected at most"),
        (["model.policy.max_budgets=3"], "model.policy.max_budgets=3: expected at least 4"),
        (["data.visual_length=64"], "data.visual_length=64: expected at least 65"),
        (["model.anyres.packing=3"], "model.anyres.packing=3: expected 1, 2 or 4"),
        (["model.anyres.packing=4", "data.visual_length=16"], "data.visual_length=16: expected at least 17"),
        (
            ["model.anyres.packing_kind=shuffle"],
            "model.anyres.packing_kind='shuffle': has no effect while model.anyres.packing=1",
        ),
        (["model.reduction.method=vispruned"], "did you mean 'vispruner' or 'divprune'?"),
        (["model.reduction.method=hired"], "model.reduction.ratio=1: keeps every token; expected less than 1"),
        (["model.reduction.ratio=0.5"], "model.reduction.ratio=0.5: has no effect while model.reduction.method='none'"),
        (["model.reduction.method=divprune", "model.reduction.ratio=0"], "model.reduction.ratio=0: expected a number"),
        (
            ["model.reduction.method=divprune", "model.reduction.ratio=0.25", "model.reduction.base_share=0.3"],
            "model.reduction.base_share=0.3: has no effect while model.reduction.method='divprune'; expected"
            " method='hired'",
        ),
        (["model.reduction.method=m3", "model.reduction.ratio=0.5"], "averages windows of 1 x 1 patches"),
        (["model.reduction.method=m3", "model.reduction.ratio=0.01"], "expected 1/4 to 1/8^2"),
        (
            ["model.reduction.method=vispruner", "model.reduction.ratio=0.25", "model.anyres.packing=4"],
            "model.anyres.packing=4: is a reduction of its own; expected 1 with model.reduction.method='vispruner'",
        ),
        (
            ["model.reduction.method=vispruner", "model.reduction.ratio=0.25", "data.small_pictures=True"],
            "data.small_pictures=True: lets pictures share tiles",
        ),
        (
            ["model.reduction.method=vispruner", "model.reduction.ratio=0.25", "data.visual_length=16"],
            "data.visual_length=16: expected at least 17, the visual tokens of one tile of 96 pixels in patches of 12,"
            " reduced by vispruner, and a newline",
        ),
        (
            ["model.reduction.method=m3", "model.reduction.ratio=0.111", "data.visual_length=4"],
            "data.visual_length=4: expected at least 5",
        ),
        (
            ["model.reduction.scales=1,0.25"],
            "model.reduction.scales=(1.0, 0.25): has no effect while model.reduction.method='none'; expected"
            " method='m3'",
        ),
        (
            ["model.reduction.method=m3", "model.reduction.ratio=0.25", "model.reduction.scales=1,0.111"],
            "model.reduction.ratio=0.25: expected one of model.reduction.scales=(1.0, 0.111)",
        ),
        (
            ["model.reduction.method=m3", "model.reduction.ratio=0.25", "model.reduction.scales=0.2,0.25"],
            "0.2 and 0.25 both average windows of 2 x 2 patches",
        ),
        (["model.reduction.scales=0.25,0.25"], "expected different numbers from 0.0001 to 1"),
        (
            ["model.dropping.method=fastv", "model.dropping.layers=2", "model.dropping.ratios=0.5"],
            "model.dropping.method='fastv': drops tokens between the layers of a dense plan; expected"
            " model.plan='dense'",
        ),
        (["model.dropping.layers=2"], "has no effect while model.dropping.method='none'"),
        ([*DROPPING, "model.bidirectional_vision=True"], "model.bidirectional_vision=True: lets visual tokens see"),
        ([*DROPPING, "model.dropping.layers="], "model.dropping.layers=(): expected different numbers from 1 to 8"),
        (
            [*DROPPING, "model.dropping.layers=3,2"],
            "expected different numbers from 1 to 8, ascending, such as (2, 4, 6)",
        ),
        ([*DROPPING, "model.dropping.layers=2,9"], "model.dropping.layers=(2, 9): expected different numbers from 1"),
        (
            [*DROPPING, "model.dropping.ratios=0.2,0.5"],
            "model.dropping.ratios=(0.2, 0.5): expected 2 shares, descending",
        ),
        ([*DROPPING, "model.dropping.ratios=0.5"], "model.dropping.ratios=(0.5,): expected 2 shares, descending"),
        ([*DROPPING, "model.dropping.score=paper"], "expected method 'fastv', or leave it at 'code'"),
        ([*DROPPING, "model.dropping.method=fastv"], "model.dropping.layers=(2, 4): expected one number"),
        (["model.anyres.pinpoints=(1x1),...,(2x2)"], "data.tiles=1: expected 2 "),
        (["model.plan=dense"], "stages: 'warmup' needs model.plan='visor'"),
        (["stages=base,dense"], "stages: 'dense' needs model.plan='dense'"),
        (["mesh.replica=-1"], "mesh.replica=-1, mesh.fsdp=-1, mesh.tensor=1: expected -1"),
        (["mesh.tensor=3"], "mesh.tensor=3: expected a divisor of model.text.num_heads=4"),
        (["mesh.fsdp=5"], "data.batch_size=32: expected a multiple of 5"),
        (["mesh.fsdp=32", "stage_overrides.policy.batch_size=48"], "stage_overrides.policy.batch_size=48: expected a"),
        (["stage_overrides.full.init_from=universal"], "stage_overrides.full.init_from='universal': expected ''"),
        (["stage_overrides.universal.init_from=ful"], "did you mean 'full'?"),
    ],
)
def test_fields_that_contradict_each_other(overrides, expected):
    assert expected in refused(*overrides)


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("train.learning_rate=1", "train.learning_rate", 1.0),
        ("train.learning_rate=3e-4", "train.learning_rate", 3e-4),
        ("train.remat=True", "train.remat", "full"),
        ("train.remat=0", "train.remat", "none"),
        ("train.remat=offload", "train.remat", "offload"),
        ("stages=warmup,full", "stages", ("warmup", "full")),
        ('stages=["warmup", "full"]', "stages", ("warmup", "full")),
        ("evaluate.dials=(0, 1)", "evaluate.dials", (0.0, 1.0)),
        ("evaluate.dials=-1,2.5", "evaluate.dials", (-1.0, 2.5)),
        ("train.trainable=(?!routing/)", "train.trainable", ("(?!routing/)",)),
        ("train.trainable=('a/', 'b/')", "train.trainable", ("a/", "b/")),
        ("train.group_rates=(('vision/', 0.2),)", "train.group_rates", (("vision/", 0.2),)),
        ("data.fonts=['a', 'b']", "data.fonts", ("a", "b")),
        ("data.fonts=", "data.fonts", ()),
        ("tokenizer.system=a=b, c", "tokenizer.system", "a=b, c"),
    ],
)
def test_overrides_become_values_of_the_field_s_type(override, field, value):
    config = changed(override)
    for part in field.split("."):
        config = getattr(config, part)
    assert config == value
    assert type(config) is type(value)


def test_of_a_repeated_field_the_last_counts_with_a_warning(caplog):
    assert changed("train.steps=3", "train.steps=4").train.steps == 4
    assert "--config.train.steps is given twice: using '4', not '3'" in caplog.text


def test_a_checked_configuration_takes_no_new_fields():
    config = changed()
    with pytest.raises(AttributeError):
        config.train.stepz = 3


def test_grids():
    assert parse_grids("(1x2), (2x1)") == ((1, 2), (2, 1))
    assert parse_grids("(1x1),...,(2x3)") == ((1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3))
    assert parse_grids("") == ()


@given(st.sampled_from(sorted(SCHEMA)), st.text(max_size=20))
def test_any_text_is_a_value_or_refused_by_name(name, text):
    try:
        config = changed(f"{name}={text}")
    except RequestError as error:
        assert str(error)
    else:
        assert from_json(to_json(config)) == config


@given(st.sampled_from(all_names()), st.integers(0, 40))
def test_a_typo_gets_a_suggestion(name, place):
    slip = name[: place % len(name)] + "~" + name[place % len(name) :]
    if "." not in slip[place % len(name) :]:  # the typo is in the name of the field, not of its section
        with pytest.raises(RequestError, match="unknown field"):
            changed(f"{slip}=1")


def test_independent_turns_train_on_answers():
    message = refused("data.independent_turns=True", "loss.targets=llava")
    assert message.startswith("loss.targets='llava': data.independent_turns=True trains on the answers only; expected")
    assert changed("data.independent_turns=True").data.independent_turns


def test_nearest():
    assert nearest("warmpu", STAGES) == "did you mean 'warmup'?"
    assert nearest("Warmup", STAGES) == "did you mean 'warmup'?"
    assert nearest("zzz", STAGES) == ""
    assert "did you mean" not in refused("train.profile=0:3")  # '10:3' in its rule is an example


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.use_ema=True"], "train.use_ema=True: there is no average while train.ema_decay=0"),
        (["train.ema_decay=1.0"], "train.ema_decay=1.0: expected a number from 0 to less than 1"),
        (["train.accumulate=0"], "train.accumulate=0: expected a number of at least 1"),
        (["stage_overrides.full.accumulate=3"], "splits them once more"),
        (["train.moments_dtype=float16"], "train.moments_dtype=float16: expected one of 'float32', 'bfloat16'"),
        (["mesh.dcn_replica=-1", "mesh.dcn_fsdp=-1"], "expected -1 (all remaining slices) at most once"),
        (["mesh.dcn_replica=5"], "mesh.fsdp=-1, mesh.dcn_replica=5 split the rows"),
    ],
)
def test_fields_of_a_sharded_step_are_checked(changes: list[str], message: str) -> None:
    assert message in refused(*changes)
