"""Bad inputs and the reaction to each: exit status and part of the one-line message; no traceback, nothing executed.

Numbers are those of a list of 80 bad inputs that a release has to survive: 1-20 configuration and command line, 21-49
data (`tests/data/test_bad_inputs.py`, `tests/data/sources/test_hostile_files.py`), 50-60 weights, 61-70 checkpoints,
71-75 launching, 76-80 export and surroundings. `DETAILS` names the tests that go deeper, and those of inputs that need
other means than one command.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

import visor_jax.errors
from tests.faults.bad_inputs import (
    Case,
    Places,
    as_bfloat16,
    both,
    edit_json,
    edit_weights,
    flip,
    header,
    largest,
    linked,
    locked,
    newest,
    pickled,
    rename,
    reseal,
    sharded,
    unfinished,
    without,
    write,
)
from visor_jax.__main__ import main
from visor_jax.testing.bucket import without_gcsfs

ROOT = Path(visor_jax.errors.__file__).parents[1]
pytestmark = pytest.mark.usefixtures("quick")
CONFIG = "--config={tmp}/tiny.py"
NEW = f"train {CONFIG} --config.stage=base --workdir={{tmp}}/new"
PLAN = f"plan {CONFIG} --image=64x64"
ASK = "generate {where} --image={tmp}/red.png --question=What? --max-new-tokens=1"
ASK_RUN = ASK.replace("{where}", "--workdir={run}")
ASK_MODEL = ASK.replace("{where}", "--model={model}")
IMPORT = f"import --from={{model}} --workdir={{tmp}}/new {CONFIG}"
POLICY = "train --workdir={run} --config.stage=policy"


# --- 1 to 20: configuration and command line --------------------------------------------------------------------------

NO_RUN = "config.json: no such file; expected a run's folder"
TRAP = "open('{tmp}/ran', 'w')\n"
COMMAND_LINE: dict[str, Case] = {
    "1 unknown field": Case(f"{NEW} --config.train.stepz=3", 2, "did you mean 'train.steps'?"),
    "2 wrong type": Case(f"{NEW} --config.train.steps=ten", 2, "train.steps=ten: expected a whole number"),
    "3 nan": Case(f"{NEW} --config.train.learning_rate=nan", 2, "train.learning_rate=nan: expected a finite number"),
    "3 inf": Case(f"{NEW} --config.train.learning_rate=inf", 2, "train.learning_rate=inf: expected a finite number"),
    "3 below 0": Case(f"{NEW} --config.train.learning_rate=-1", 2, "train.learning_rate=-1: expected"),
    "4 no steps": Case(f"{NEW} --config.train.steps=0", 2, "train.steps=0: expected a number of at least 1"),
    "4 -5 steps": Case(f"{NEW} --config.train.steps=-5", 2, "train.steps=-5: expected a number of at least 1"),
    "5 stray": Case(f"run extra {CONFIG} --workdir={{tmp}}/new", 2, "run: unexpected argument 'extra'"),
    "6 no --config": Case("run --workdir={tmp}/new", 2, "{tmp}/new/config.json: no such file; expected a run's folder"),
    "7 missing": Case("run --config={tmp}/none.py --workdir={tmp}/new", 2, "{tmp}/none.py: no such file"),
    "7 raises": Case(
        "run --config={tmp}/bad.py --workdir={tmp}/new", 2, "{tmp}/bad.py: ZeroDivisionError in line 1",
        write("bad.py", "1 / 0"),
    ),
    "8 a bucket's": Case("run --config=gs://b/c.py --workdir={tmp}/new", 2, "expected a local file"),
    "8 a workdir's": Case(
        "run --config={run}/deep/c.py --workdir={run}", 2, "a workdir's files are not executed",
        lambda at: ((at.run / "deep").mkdir(), (at.run / "deep/c.py").write_text(TRAP.format(tmp=at.tmp))),
    ),
    "9 a flag twice": Case(f"{PLAN} --image=32x32", 0, "", None, "--image is given 2 times: the last one counts"),
    "9 a field twice": Case(
        f"{PLAN} --config.seed=1 --config.seed=2", 0, "", None, "--config.seed is given twice: using '2', not '1'"
    ),
    "10 batch and mesh": Case(f"{NEW} --config.mesh.fsdp=3", 2, "data.batch_size=4: expected a multiple of 3"),
    "11 mesh and devices": Case(f"{NEW} --config.mesh.fsdp=2", 2, "mesh.fsdp=2"),
    "12 too few layers": Case(f"{NEW} --config.model.text.num_layers=2", 2, "expected at least 3"),
    "12 too many slots": Case(f"{NEW} --config.model.text.num_layers=600", 2, "expected at most"),
    **{
        f"13 {name} {text}": Case(f"{command} --budget={text}", 2, f"budget '{text}'")
        for text in ("0b2", "99", "-1", "0b111111")
        for name, command in {"generate": ASK_RUN, "evaluate": "evaluate --workdir={run}"}.items()
    },
    "13 generate, empty": Case(f"{ASK_RUN} --budget=", 2, "budget ''"),
    "13 evaluate, empty": Case("evaluate --workdir={run} --budget=", 2, "--budget=: expected"),
    "14 unknown stage": Case("train --workdir={run} --config.stage=ful", 2, "did you mean 'full'?"),
    "14 train before": Case(
        f"train {CONFIG} --config.stage=full --workdir={{tmp}}/new", 2, "init_from='warmup'"
    ),
    "14 search before": Case(f"search {CONFIG} --workdir={{tmp}}/new", 2, "'full' is not complete; run it first"),
    "14 label before": Case(f"label {CONFIG} --workdir={{tmp}}/new", 2, "'universal' is not complete; run it first"),
    "14 evaluate before": Case(f"evaluate {CONFIG} --workdir={{tmp}}/new", 2, NO_RUN),
    "14 export before": Case("export --workdir={tmp}/new --out={tmp}/out", 2, NO_RUN),
    "14 report before": Case("report --workdir={run}", 2, "eval/test.json", without("eval")),
    "15 a file": Case(NEW.replace("/new", "/red.png"), 2, "{tmp}/red.png"),
    "16 another config": Case("train --workdir={run} --config.seed=9 --config.stage=base", 2, "seed is 0 there and 9"),
    "17 another run": Case(POLICY, 2, "is in use by another run (host ", locked),
    "19 a window too small": Case(f"{NEW} --config.data.visual_length=10", 2, "data.visual_length=10: expected at"),
    "20 not UTF-8, config": Case("run --config={tmp}/a\udcff.py --workdir={tmp}/new", 2, "expected UTF-8"),
    "20 not UTF-8, workdir": Case(f"run {CONFIG} --workdir={{tmp}}/\udcff", 2, "expected UTF-8"),
    "20 a new line, config": Case("run --config={tmp}/a\nb.py --workdir={tmp}/new", 2, "printable"),
    "20 a new line, workdir": Case(f"run {CONFIG} --workdir={{tmp}}/a\nb", 2, "printable"),
    "20 a new line, out": Case("export --workdir={run} --out={tmp}/a\nb", 2, "printable"),
}  # fmt: skip


# --- 50 to 60: weights ------------------------------------------------------------------------------------------------

UP, NORM = "model.language_model.layers.0.mlp.up_proj.weight", "model.language_model.norm.weight"
ONE = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
MAP = {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"}


def evil_code(at: Places) -> None:
    for name in ("evil.py", "__init__.py", "configuration_visor.py", "modeling_visor.py"):
        (at.model / name).write_text(TRAP.format(tmp=at.tmp))


def vocabulary(at: Places) -> None:
    """Adds a token to the tokenizer that the embeddings do not have."""
    file = at.model / "tokenizer.json"
    record = json.loads(file.read_text())
    record["added_tokens"].append({**record["added_tokens"][-1], "id": 9000, "content": "<|more|>"})
    file.write_text(json.dumps(record))


WEIGHTS: dict[str, Case] = {
    **{
        f"50 only {name}": Case(ASK_MODEL, 2, f"({name}: pickles are never read)", pickled(name))
        for name in ("pytorch_model.bin", "model.pt", "model.pth", "last.ckpt")
    },
    "50 a pickle renamed": Case(ASK_MODEL, 2, "model.safetensors: no whole safetensors", pickled("model.safetensors")),
    "50 a pickle beside": Case(ASK_MODEL, 0, "", pickled("pytorch_model.bin", alone=False)),
    "51 a missing shard": Case(
        ASK_MODEL, 2, "model-00002-of-00002.safetensors: no such file; the index names it",
        sharded("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    ),
    "52 an index that leads out": Case(ASK_MODEL, 2, "weight_map: expected", sharded("../model.safetensors")),
    "52 an absolute index": Case(ASK_MODEL, 2, "weight_map: expected", sharded("/etc/x.safetensors")),
    "53 missing": Case(ASK_MODEL, 2, f"{NORM} is missing", edit_weights(lambda t: t.pop(NORM))),
    "53 extra": Case(ASK_MODEL, 2, "more.x is not expected", edit_weights(lambda t: t.update({"more.x": np.ones(2)}))),
    "53 renamed": Case(ASK_MODEL, 2, f"{NORM} is missing", edit_weights(lambda t: rename(t, NORM, "model.norm.w"))),
    "54 shape": Case(
        ASK_MODEL, 2, f"{NORM} has shape (31,), expected (32,)", edit_weights(lambda t: t.update({NORM: t[NORM][1:]}))
    ),
    "54 transposed": Case(
        ASK_MODEL, 2, f"{UP} has shape (32, 48), expected (48, 32)",
        edit_weights(lambda t: t.update({UP: np.ascontiguousarray(t[UP].T)})),
    ),
    "54 dtype": Case(
        ASK_MODEL, 2, f"{NORM} is I32, expected one of F32", edit_weights(lambda t: t.update({NORM: np.ones(32, "i4")}))
    ),
    "55 NaN": Case(ASK_MODEL, 2, f"{NORM} holds NaN or Inf", edit_weights(lambda t: t[NORM].fill(np.nan))),
    "55 Inf": Case(IMPORT, 2, f"{NORM} holds NaN or Inf", edit_weights(lambda t: t[NORM].fill(np.inf))),
    "56 a header of 2^40": Case(ASK_MODEL, 2, "a header of 1,099,511,627,776 bytes", header("{}", length=2**40)),
    "56 overlap": Case(ASK_MODEL, 2, "no whole safetensors", header(f'{{"a": {ONE}, "b": {ONE}}}', bytes(4))),
    "56 overflow": Case(
        ASK_MODEL, 2, "no whole safetensors",
        header('{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 4]}}', bytes(4)),
    ),
    "56 a name twice": Case(ASK_MODEL, 2, "a is in the header twice", header(f'{{"a": {ONE}, "a": {ONE}}}', bytes(4))),
    "57 auto_map": Case(
        ASK_MODEL, 0, "", both(edit_json("{model}/config.json", auto_map=MAP), evil_code), "auto_map",
    ),
    "57 trust_remote_code": Case(
        ASK_MODEL, 0, "", both(edit_json("{model}/config.json", trust_remote_code=True), evil_code), "trust_remote_code"
    ),
    "57 _attn_implementation_internal": Case(
        ASK_MODEL, 0, "",
        both(edit_json("{model}/config.json", _attn_implementation_internal="evil/kernels"), evil_code),
        "_attn_implementation_internal",
    ),
    "58 wrong sizes": Case(
        ASK_MODEL, 2, "has shape", edit_json("{model}/config.json", text_config={"intermediate_size": 64})
    ),
    "58 negative": Case(
        ASK_MODEL, 2, "hidden_size=-32: expected", edit_json("{model}/config.json", text_config={"hidden_size": -32})
    ),
    "58 1e9 layers": Case(
        ASK_MODEL, 2, "num_hidden_layers=1000000000: expected",
        edit_json("{model}/config.json", text_config={"num_hidden_layers": 10**9}),
    ),
    "59 vocabulary": Case(ASK_MODEL, 2, "tokenizer", vocabulary),
    "60 untied without a head": Case(
        ASK_MODEL, 2, "lm_head.weight is missing",
        edit_json("{model}/config.json", tie_word_embeddings=False, text_config={"tie_word_embeddings": False}),
    ),
    "60 tied to another head": Case(
        ASK_MODEL, 2, "lm_head.weight differs from the embeddings",
        edit_weights(lambda t: t.update({"lm_head.weight": np.ones((474, 32), np.float32)})),
    ),
}  # fmt: skip


# --- 61 to 70: checkpoints --------------------------------------------------------------------------------------------


OTHER = "--config.model.text.intermediate_size=64"
CHECKPOINTS: dict[str, Case] = {
    "61 an empty step": Case(POLICY, 0, "", unfinished(lambda c: (c / "13").mkdir()), "13 skipped: its save was never"),
    "61 a temporary step": Case(POLICY, 0, "", unfinished(lambda c: (c / "9.orbax-checkpoint-tmp").mkdir())),
    "61 no number": Case(POLICY, 0, "", unfinished(lambda c: (c / "latest").mkdir())),
    "61 a giant step": Case(
        POLICY, 0, "", unfinished(lambda c: shutil.copytree(c / "4", c / "99999999999")),
        "99999999999 skipped: holds step 4",
    ),
    "61 a link": Case(
        POLICY, 0, "", unfinished(lambda c: (c / "7").symlink_to("/etc")), "7 skipped: is a symbolic link"
    ),
    "62 no marker": Case(
        POLICY, 0, "", unfinished(lambda c: (c / "4/commit.json").unlink()), "4 skipped: its save was never finished"
    ),
    "63 a bit": Case(
        POLICY, 0, "", unfinished(lambda c: flip(largest(c / "4/arrays"))), "does not match its checksum"
    ),
    "63 cut short": Case(
        POLICY, 0, "", unfinished(lambda c: os.truncate(largest(c / "4/arrays"), 9)), "has 9 bytes instead of"
    ),
    "63 a file gone": Case(POLICY, 0, "", unfinished(lambda c: largest(c / "4/arrays").unlink()), "is missing"),
    "63 every step": Case(
        POLICY, 1, "no step can be trusted",
        unfinished(lambda c: [flip(largest(step / "arrays")) for step in c.iterdir()]),
    ),
    "63 a complete stage's": Case(
        ASK_RUN, 1, "is the step that policy/complete.json names, and cannot be used",
        lambda at: flip(largest(newest(at.run) / "arrays/params")),
    ),
    "64 another shape": Case(f"{POLICY} {OTHER}", 2, "intermediate_size is 48 there and 64 here", unfinished()),
    "64 another plan": Case(
        "train --workdir={run} --config.stage=full --config.model.plan=dense --config.stages=base,full", 2, "plan",
        unfinished(),
    ),
    "64 another shape's step": Case(
        POLICY, 2, "another configuration or dataset",
        unfinished(lambda c: (shutil.rmtree(c), shutil.copytree(c.parent.parent / "universal/checkpoints", c))),
    ),
    "65 another version's workdir": Case(
        ASK_RUN, 2, f"format 99, expected 1; read it with visor_jax {visor_jax.__version__}",
        edit_json("{run}/config.json", format=99),
    ),
    "65 a workdir of no known version": Case(
        ASK_RUN, 2, "format 99, expected 1; read it with the version of visor_jax that wrote it",
        edit_json("{run}/config.json", format=99, versions=["evil\x1b[31m"]),
    ),
    "65 other random numbers": Case(
        POLICY, 2, f"finish it with visor_jax {visor_jax.__version__}, or start in another folder",
        both(unfinished(), edit_json("{run}/config.json", random_numbers=1)),
    ),
    "65 a later step": Case(
        POLICY, 2, "checkpoint format 99; this version reads 1 and 2", unfinished(lambda c: reseal(c / "4", format=99))
    ),
    "66 another dtype": Case(
        POLICY, 2, "nothing is cast silently", unfinished(lambda c: as_bfloat16(c / "4")),
    ),
    "68 no position": Case(POLICY, 0, "", unfinished(lambda c: reseal(c / "4", meta={})), "resumed after step 4"),
    "69 a link in a step": Case(
        ASK_RUN, 1, "is a symbolic link", lambda at: linked(largest(newest(at.run) / "arrays/params"))
    ),
    "69 a folder that is a link": Case(ASK_RUN, 1, "is a symbolic link", lambda at: linked(newest(at.run))),
}  # fmt: skip


# --- 71 to 75: launching ----------------------------------------------------------------------------------------------

LAUNCH = (
    f"launch --target=tpu --topology=v5e:4x4 --zone=us-west4-a --workdir=gs://runs-1/new {CONFIG} --force --dry-run"
)
FIRST = f"{LAUNCH} --name=first"


def without_clients() -> contextlib.AbstractContextManager[object]:
    return mock.patch.dict(os.environ, PATH="/nonexistent")


LAUNCHING: dict[str, Case] = {
    **{
        f"71 a name with {kind}": Case(f"{LAUNCH} --name={name}", 2, "--name=")
        for kind, name in {
            "a semicolon": "a;id", "a substitution": "a$(id)", "a new line": "a\nb", "a quote": "a'b",
            "64 characters": "a" * 64, "a leading dash": "-a", "nothing": "",
        }.items()
    },
    "71 a name in capitals": Case(f"{LAUNCH} --name=My-Run", 2, "did you mean 'my-run'?"),
    "72 a zone without the chips": Case(f"{FIRST} --zone=us-west4-b", 2, "has no v5e; did you mean 'us-west4-a'"),
    "72 an unknown chip": Case(f"{FIRST} --topology=v9:4x4", 2, "unknown chip 'v9'; known are v4, v5e,"),
    "72 an unknown grid": Case(f"{FIRST} --topology=v5e:4x5", 2, "the nearest are v5e:4x4 and v5e:4x8"),
    "72 TPUs for Slurm": Case(f"{FIRST} --target=slurm", 2, "--topology=v5e:4x4"),
    "73 tpu7x": Case(f"{FIRST} --topology=tpu7x:2x2x2 --zone=us-central1-c", 2, "use --target=gke"),
    "74 no client": Case(
        FIRST.replace(" --dry-run", ""), 2, "gcloud: not found on PATH; install the Google Cloud CLI",
        lambda at: without_clients(),
    ),
    "75 a secret's value": Case(f"{FIRST} --secret=HF_TOKEN=s3cr3t", 2, "--secret=HF_TOKEN=...: expected the name"),
    "75 a key as a secret's name": Case(f"{FIRST} --secret=hf_{'a' * 30}", 2, "never its value (not repeated here)"),
    "75 a key in a field": Case(
        f"{FIRST} --config.data.root=hf_{'a' * 30}", 2, "looks like a secret, and other users see a command line",
    ),
}  # fmt: skip


# --- 76 to 80: export and surroundings --------------------------------------------------------------------------------


def filled(at: Places) -> None:
    (at.tmp / "out").mkdir()
    (at.tmp / "out/mine.txt").write_text("keep")


def hostile_names(at: Places) -> None:
    """Puts a script into the evaluation's tasks, which the report shows."""
    file = at.run / "eval/test.json"
    file.write_text(file.read_text().replace('"above"', '"<script>alert(1)</script>"'))


SURROUNDINGS: dict[str, Case] = {
    "76 a filled folder": Case("export --workdir={run} --out={tmp}/out", 2, "--out={tmp}/out: is not empty", filled),
    "76 a filled folder, forced": Case(
        "export --workdir={run} --out={tmp}/out --force", 2, "holds something else than a model", filled
    ),
    "76 the workdir itself, forced": Case(
        "export --workdir={run} --out={run} --force", 2, "holds something else than a model", lambda at: None
    ),
    "78 a script in the report": Case("report --workdir={run}", 0, "", hostile_names),
    "80 a bucket": Case(
        f"run {CONFIG} --workdir=gs://bucket/run", 2, "pip install 'visor-jax[gcs]'", lambda at: without_gcsfs()
    ),
}
CASES = {**COMMAND_LINE, **WEIGHTS, **CHECKPOINTS, **LAUNCHING, **SURROUNDINGS}

# Number -> where an input is tested that one command does not show, or tested in more detail.
DETAILS = {
    15: "tests/commands/test_surroundings.py",
    18: "tests/test_main.py",
    37: "tests/data/test_bad_inputs.py",
    67: "tests/checkpoint/test_processes.py",
    70: "tests/faults/test_bad_inputs.py",
    71: "tests/launching/test_hostile.py",
    72: "tests/launching/test_description.py",
    74: "tests/launching/test_tpu.py",
    75: "tests/launching/test_hostile.py",
    77: "tests/commands/test_signals.py",
    79: "tests/test_main.py",
}

# Their like runs in the default suite: here, or in the tests of damage.
SLOW = (
    *("13 evaluate 0b2", "13 evaluate -1", "13 evaluate 0b111111", "13 generate 0b111111", "50 a pickle beside"),
    *("57 trust_remote_code", "61 a temporary step", "61 no number", "61 a giant step", "61 a link", "62 no marker"),
    *("63 cut short", "63 a file gone", "68 no position", "78 a script in the report"),
)


@pytest.fixture(scope="module")
def exported(tiny_run: Path, compiled: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of the tiny run, which tests must not change."""
    out = tmp_path_factory.mktemp("exported") / "model"
    assert main(["export", f"--workdir={tiny_run}", f"--out={out}"]) == 0
    return out


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES])
def test_a_bad_input_has_its_reaction(
    name: str,
    tiny_run: Path,
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    case = CASES[name]
    monkeypatch.chdir(tmp_path)
    at = Places(tmp_path / "run", tmp_path / "model", tmp_path / "more")
    at.tmp.mkdir()
    for used, source, copy in (("{run}", tiny_run, at.run), ("{model}", exported, at.model)):
        if used in case.command:
            shutil.copytree(source, copy)
    Image.new("RGB", (48, 48), "red").save(at.tmp / "red.png")
    (at.tmp / "tiny.py").write_text("from visor_jax.testing import tiny_config as get_config\n")
    around = case.change(at) if case.change else None
    capsys.readouterr()
    caplog.set_level(logging.INFO, "visor_jax")
    with around if isinstance(around, contextlib.AbstractContextManager) else contextlib.nullcontext():
        ended = main([argument.format(**at._asdict()) for argument in case.command.split(" ")])
    err = capsys.readouterr().err
    assert ended == case.status and "Traceback" not in err, err
    assert case.warned in caplog.text
    assert not (at.tmp / "ran").exists(), "code or a pickle was run"
    if case.status:
        *_, last = [line for line in err.splitlines() if line.startswith("visor: ")]
        assert case.message.format(**at._asdict()) in last and last.isprintable() and len(last) < 800, err
        assert not (at.tmp / "new/config.json").exists(), "a refused request leaves nothing behind"
        assert (at.tmp / "out/mine.txt").exists() == (case.change is filled)
    if name.startswith("78"):
        page = (at.run / "report/index.html").read_text()
        assert "&lt;script&gt;alert(1)" in page and "<script>alert(1)" not in page


def test_every_number_is_covered() -> None:
    data = {int(number) for number in re.findall(r'"(\d\d) ', (ROOT / "tests/data/test_bad_inputs.py").read_text())}
    numbers = {int(name.split()[0]) for name in CASES} | set(DETAILS) | data
    assert numbers >= {*range(1, 81)}, {*range(1, 81)} - numbers
    assert all((ROOT / path).exists() for path in DETAILS.values())


def test_json_to_a_reader_that_left_is_no_failure(tmp_path: Path) -> None:
    """Number 18."""
    (tmp_path / "tiny.py").write_text("from visor_jax.testing import tiny_config as get_config\n")
    read, write_end = os.pipe()
    os.close(read)
    with os.fdopen(write_end, "w") as closed:
        command = [sys.executable, "-m", "visor_jax", "plan", "--config=tiny.py", "--image=64x64", "--json"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, stdout=closed, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment, check=False
        )
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr


@pytest.mark.slow
def test_a_secret_of_the_environment_is_never_written(tiny_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Number 70: no field takes a secret, and a workdir's files hold nothing of the environment."""
    for name in ("HF_TOKEN", "WANDB_API_KEY", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.setenv(name, "s3cr3t-value")
    shutil.rmtree(tiny_copy / "policy")
    assert main(["train", f"--workdir={tiny_copy}", "--config.stage=policy"]) == 0
    assert main(["report", f"--workdir={tiny_copy}"]) == 0
    assert not [path for path in tiny_copy.rglob("*") if path.is_file() and b"s3cr3t-value" in path.read_bytes()]
