"""Random and damaged files and texts: a request is answered or refused as `RequestError`; no other error, no code run.

`tests/test_budget.py` and `tests/config/test_overrides.py` fuzz the texts of single fields.
"""

from __future__ import annotations

import ast
import copy
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import visor_jax
from visor_jax import testing
from visor_jax.__main__ import main
from visor_jax.budget import Budget, parse_budgets
from visor_jax.config import apply_overrides, architecture, from_dict, from_json, to_json
from visor_jax.errors import RequestError
from visor_jax.hf.folder import read_shape
from visor_jax.hf.headers import locate
from visor_jax.workdir.folder import Workdir

PACKAGE = Path(visor_jax.__file__).parent
QUICK = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])

# JSON values: those that a field might hold, and those that break naive readers.
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([-1, 0, 1, 2**31, 2**63, 2**64, 10**400, 1e308]))
ATOMS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8), st.sampled_from(["\0", "\ud800", "../x"]))
VALUES = st.recursive(ATOMS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3))


def answered(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns a function's result, or None if it refuses with one line that can be printed."""
    try:
        return function(*arguments)
    except RequestError as error:
        assert str(error) and len(str(error)) < 2000
        return None


# --- headers of safetensors -------------------------------------------------------------------------------------------

ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I64", "BOOL", "F99", ""]) | ATOMS,
        "shape": st.lists(st.integers(-1, 2**64), max_size=4) | ATOMS,
        "data_offsets": st.lists(st.integers(-1, 2**64), min_size=2, max_size=2) | ATOMS,
    }
)
HEADER = st.dictionaries(st.text(max_size=6), ENTRY | VALUES, max_size=4)


@QUICK
@given(header=HEADER, length=st.none() | st.integers(0, 2**64 - 1), data=st.binary(max_size=64))
def test_any_header_is_read_or_refused(tmp_path: Path, header: Any, length: int | None, data: bytes) -> None:
    text = json.dumps(header).encode()
    size = len(text) if length is None else length
    (tmp_path / "model.safetensors").write_bytes(size.to_bytes(8, "little") + text + data)
    answered(locate, tmp_path)


@QUICK
@given(data=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    answered(locate, tmp_path)


@QUICK
@given(places=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=3), cut=st.floats(0, 1))
def test_a_damaged_file_is_read_or_refused(tmp_path: Path, places: list[tuple[float, int]], cut: float) -> None:
    """Bytes of a whole file change, or it is cut short; what is still read has the shapes of its header."""
    file = tmp_path / "model.safetensors"
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.int8)}, file)
    whole = bytearray(file.read_bytes())
    for place, byte in places:
        whole[int(place * (len(whole) - 1))] = byte
    file.write_bytes(whole[: int(cut * len(whole))] if cut < 0.5 else whole)
    for stored in (answered(locate, tmp_path) or {}).values():
        assert all(isinstance(size, int) and size >= 0 for size in stored.shape)


# --- configurations and budgets ---------------------------------------------------------------------------------------

RESOLVED = json.loads(to_json(testing.tiny_config()))


def paths(tree: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Returns the path of every section and field of a nested dict."""
    inner = (
        [path for key, value in tree.items() for path in paths(value, (*prefix, key))] if isinstance(tree, dict) else []
    )
    return [prefix, *inner] if prefix else inner


def replaced(tree: Any, path: tuple[str, ...], value: Any) -> Any:
    tree = copy.deepcopy(tree)
    node = tree
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return tree


@QUICK
@given(path=st.sampled_from(paths(RESOLVED)), value=VALUES)
def test_any_value_in_a_resolved_configuration_is_taken_or_refused(path: tuple[str, ...], value: Any) -> None:
    config = answered(from_dict, replaced(RESOLVED, path, value))
    if config is not None:
        assert from_json(to_json(config)) == config
        answered(architecture, config)


@QUICK
@given(text=st.text(max_size=40) | VALUES.map(json.dumps) | st.binary(max_size=40).map(lambda b: b.decode("latin-1")))
def test_any_text_is_a_configuration_or_refused(text: str) -> None:
    answered(from_json, text)


@QUICK
@given(
    overrides=st.lists(
        st.tuples(st.sampled_from([".".join(path) for path in paths(RESOLVED)]), VALUES.map(json.dumps)), max_size=3
    )
)
def test_any_overrides_together_are_taken_or_refused(overrides: list[tuple[str, str]]) -> None:
    answered(apply_overrides, testing.tiny_config(), [f"--config.{name}={text}" for name, text in overrides])


@QUICK
@given(text=st.text(max_size=70) | st.from_regex("0b[01]{0,70}", fullmatch=True), slots=st.integers(0, 64))
def test_any_budget_resolves_to_one_bit_per_slot_or_is_refused(text: str, slots: int) -> None:
    budget = answered(Budget.parse, text)
    bits = None if budget is None else answered(budget.resolve, slots, [(True,) * slots])
    assert bits is None or len(bits) == slots
    answered(lambda: parse_budgets([text], slots, where="viable.json: viable"))


@QUICK
@given(value=VALUES, slots=st.integers(0, 64))
def test_any_value_is_a_list_of_budgets_or_refused(value: Any, slots: int) -> None:
    answered(lambda: parse_budgets(value, slots, where="viable.json: viable"))


RECORD = {
    "config": RESOLVED,
    "format": 1,
    "random_numbers": 2,
    "versions": {"visor-jax": "0.1.0"},
    "git_revision": "",
    "data": {"pictures": "", "tokenizer": "", "train": "", "validation": ""},
}


@QUICK
@given(path=st.sampled_from([("config",), *paths({**RECORD, "config": 0})]), value=VALUES)
def test_any_value_in_a_workdirs_record_is_taken_or_refused(tmp_path: Path, path: tuple[str, ...], value: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(replaced(RECORD, path, value)))
    workdir = Workdir(tmp_path)
    answered(lambda: from_dict(workdir.config()))
    answered(workdir.check_random_numbers)
    answered(workdir.claim, testing.tiny_config())


# --- folders of models ------------------------------------------------------------------------------------------------

MODEL = {
    "model_type": "llava_onevision",
    "image_token_index": 1,
    "image_grid_pinpoints": [[28, 28]],
    "vision_aspect_ratio": "anyres_max_9",
    "vision_feature_layer": -1,
    "text_config": {"model_type": "qwen2", "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4},
    "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 32, "image_size": 28, "patch_size": 7},
}


@QUICK
@given(path=st.sampled_from(paths(MODEL)), value=VALUES)
def test_any_value_in_a_models_config_is_taken_or_refused(tmp_path: Path, path: tuple[str, ...], value: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(replaced(MODEL, path, value)))
    answered(read_shape, tmp_path)


# --- nothing from outside is run --------------------------------------------------------------------------------------


def archive(folder: Path) -> Path:
    """Writes a tar file whose members lead out of the folder they would be unpacked into."""
    file = folder / "model.tar"
    with tarfile.open(file, "w") as tar:
        for name in ("../ran", "a/../../ran", str(folder / "ran"), "config.json"):
            member = tarfile.TarInfo(name)
            member.size = 2
            tar.addfile(member, io.BytesIO(b"{}"))
    return file


@pytest.mark.parametrize("suffix", ["tar", "safetensors", "json", "py.tar"])
@pytest.mark.parametrize(
    "command",
    [
        "import --from={file} --workdir={out} --config={tiny}",
        "generate --model={file} --question=What?",
        "generate --workdir={file} --question=What?",
        "run --config={file} --workdir={out}",
        "data check --config={tiny} --config.data.source=llava --config.data.root={folder} --config.data.path={name}",
    ],
)
def test_an_archive_is_never_unpacked(
    command: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    file = archive(inner).rename(inner / f"model.{suffix}")
    (tmp_path / "tiny.py").write_text("from visor_jax.testing import tiny_config as get_config\n")
    at = {"file": file, "name": file.name, "folder": inner, "out": tmp_path / "out", "tiny": tmp_path / "tiny.py"}
    assert main(command.format(**at).split()) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not list(tmp_path.rglob("ran"))


FORBIDDEN = {"pickle.load", "pickle.loads", "marshal.loads", "shelve.open", "torch.load", "torch.hub.load", "eval",
             "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "joblib.load", "dill.load"}  # fmt: skip


def called(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    """Returns (dotted name, call) of every call in a file."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(ast.unparse(call.func), call) for call in calls]


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_of_the_package_can_run_data(file: Path) -> None:
    """No pickles, no `eval`, no shell, no unpacking of archives; arrays are never read with pickles allowed."""
    for name, call in called(ast.parse(file.read_text())):
        options = {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert name not in FORBIDDEN, f"{name} in line {call.lineno}"
        assert not name.endswith((".extractall", ".unpack_archive")), f"{name} in line {call.lineno}"
        assert options.get("shell", "False") == "False" and options.get("allow_pickle", "False") == "False"
        assert options.get("weights_only", "True") == "True"
