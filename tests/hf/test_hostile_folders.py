"""Hostile model folders that try to hang, exhaust memory or deceive are refused in one line, before reading parameters.

`test_config.py` has damaged fields and `test_foreign_folders.py` the folders of other programs. Without its refusal, a
row of this table hangs or exhausts the memory.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from visor_jax.data.tokenizer import load_tokenizer
from visor_jax.errors import RequestError
from visor_jax.hf.headers import locate
from visor_jax.hf.read import Checkpoint, check, check_tokenizer, is_folder, open_checkpoint
from visor_jax.loading import stop_tokens

Change = Callable[[Path], object]


def copied(folder: Path, into: Path) -> Path:
    """A folder of links; tests may replace its files."""
    into.mkdir()
    for file in folder.iterdir():
        (into / file.name).symlink_to(file)
    return into


def everything(folder: Path) -> Checkpoint:
    """Runs the steps of loading that precede reading parameters, in order."""
    is_folder(folder)
    checkpoint = open_checkpoint(folder)
    tokenizer = load_tokenizer(folder)
    stop_tokens(folder)
    check_tokenizer(checkpoint, tokenizer)
    check(checkpoint)
    return checkpoint


def refused(folder: Path, message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        everything(folder)
    assert "\n" not in str(error.value) and str(error.value).isprintable() and len(str(error.value)) < 700


def in_place(name: str, make: Change) -> Change:
    """Replaces one file of a folder."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


# --- every file, replaced by something invalid ------------------------------------------------------------------------


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**40)


BAD_FILES: dict[str, tuple[Change, str]] = {
    "FIFO": (os.mkfifo, "Not a regular file"),
    "endless device": (lambda path: path.symlink_to("/dev/zero"), "Not a regular file"),
    "folder": (Path.mkdir, "Is a directory|directory"),
    "sparse": (sparse, "too large|no whole safetensors"),
    "empty": (Path.touch, "not valid JSON|no whole safetensors|not a tokenizer"),
    "nested": (lambda path: path.write_text('{"a":' * 100_000), "nested too deeply|header of|no whole"),
    "digits": (lambda path: path.write_text('{"a": ' + "9" * 5000 + "}"), "not valid JSON|header of|not a tokenizer"),
    "list": (lambda path: path.write_text("[1]"), "holds list, expected an object|no whole|not a tokenizer"),
    "bytes": (lambda path: path.write_bytes(b"\xff\xfe\x00" * 9), "not valid JSON|header of|cannot read"),
}
FILES = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
    "tokenizer.json",
    "model.safetensors.index.json",
    "model.safetensors",
)


@pytest.mark.parametrize("kind", BAD_FILES)
@pytest.mark.parametrize("name", FILES)
def test_a_path_that_is_not_a_file_is_refused(saved: dict[str, Path], tmp_path: Path, name: str, kind: str) -> None:
    make, message = BAD_FILES[kind]
    folder = copied(saved["shards" if "index" in name else "tied"], tmp_path / "folder")
    in_place(name, make)(folder)
    with pytest.raises(RequestError, match=message) as error:
        everything(folder)
    assert name in str(error.value) and len(str(error.value)) < 700


# --- headers of safetensors -------------------------------------------------------------------------------------------


def raw(header: str | bytes, data: bytes = b"", length: int | None = None) -> Change:
    """Writes a safetensors file with this header."""
    encoded = header.encode() if isinstance(header, str) else header
    size = struct.pack("<Q", len(encoded) if length is None else length)
    return in_place("model.safetensors", lambda path: path.write_bytes(size + encoded + data))


def tensor(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets})


MANY = "{" + ",".join(f'"t{i}": {tensor(shape=[0], offsets=[0, 0])}' for i in range(100_000)) + "}"
MORE = "{" + ",".join(f'"t{i}": {tensor(shape=[0], offsets=[0, 0])}' for i in range(20_000)) + "}"
SOME = "{" + ",".join(f'"t{i}": {tensor(shape=[0], offsets=[0, 0])}' for i in range(9_000)) + "}"
HEADERS: dict[str, tuple[Change, str]] = {
    "a name twice": (raw(f'{{"a": {tensor()}, "a": {tensor()}}}', bytes(4)), "a is in the header twice"),
    "a field twice": (raw('{"a": {"dtype": "F32", "dtype": "F16"}}'), "dtype is in the header twice"),
    "a header longer than the file": (raw("{}", length=2**62), "a header of .* bytes, expected at most"),
    "a header past the end": (raw("{}", length=1000), "no whole safetensors"),
    "100,000 empty tensors": (raw(MANY), "a header of .* bytes, expected at most 4,194,304"),
    "20,000 empty tensors": (raw(MORE), "20,000 tensors, expected at most 10,000"),
    "9,000 empty tensors": (raw(SOME), "t0, t1, t2 and 8,997 more are not expected"),
    "overlapping tensors": (raw(f'{{"a": {tensor()}, "b": {tensor()}}}', bytes(4)), "no whole safetensors"),
    "bytes of no tensor": (raw(f'{{"a": {tensor()}}}', bytes(9)), "no whole safetensors"),
    "offsets outside": (raw(f'{{"a": {tensor(offsets=[0, 2**40])}}}', bytes(4)), "no whole safetensors"),
    "a negative shape": (raw(f'{{"a": {tensor(shape=[-1])}}}', bytes(4)), "no whole safetensors"),
    "a shape that overflows": (raw(f'{{"a": {tensor(shape=[2**33, 2**33])}}}', bytes(4)), "no whole safetensors"),
    "a shape that is no list": (raw(f'{{"a": {tensor(shape="x")}}}', bytes(4)), "no whole safetensors"),
    "an unknown dtype": (raw(f'{{"a": {tensor("F99")}}}', bytes(4)), "no whole safetensors"),
    "a tensor that is a number": (raw('{"a": 3}'), "no whole safetensors"),
    "a list": (raw("[]"), "holds list, expected an object"),
    "names of a terminal": (raw(f'{{"\\u001b[31m\\n": {tensor()}}}', bytes(4)), r"'\\x1b\[31m\\n' is not expected"),
    "a name of a megabyte": (raw(f'{{"{"a" * 2**20}": {tensor()}}}', bytes(4)), r"aaa\.\.\. is not expected"),
    "metadata only": (raw('{"__metadata__": {"a": "b"}}'), "more are missing"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_damaged_header_is_refused(saved: dict[str, Path], tmp_path: Path, case: str) -> None:
    change, message = HEADERS[case]
    folder = copied(saved["tied"], tmp_path / "folder")
    change(folder)
    refused(folder, message)


# --- sizes, indices and other files -----------------------------------------------------------------------------------


def config(**changes: Any) -> Change:
    """Changes fields of config.json; `text_config={...}` changes fields of a section."""

    def change(folder: Path) -> None:
        whole = json.loads((folder / "config.json").read_text())
        for name, value in changes.items():
            whole[name] = {**whole[name], **value} if isinstance(value, dict) and name in whole else value
        in_place("config.json", lambda path: path.write_text(json.dumps(whole)))(folder)

    return change


def index(*names: str) -> Change:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        table = {f"tensor{number}": name for number, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))

    return change


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")


SIZES: dict[str, tuple[Change, str]] = {
    "16 million heads": (config(text_config={"num_attention_heads": 2**24}), "a whole number from 1 to 1024"),
    "1024 heads": (
        config(text_config={"num_attention_heads": 1024, "head_dim": 4096}),
        r"q_proj\.weight has shape \(32, 32\), expected \(4194304, 32\)",
    ),
    "heads of 4096": (config(text_config={"head_dim": 4096}), r"q_proj\.weight has shape .*expected \(16384, 32\)"),
    "a wide decoder": (config(text_config={"hidden_size": 2**24}), "hidden_size=16777216: expected a whole number"),
    "a wide decoder within bounds": (config(text_config={"hidden_size": 2**14}), r"has shape .*, expected \(.*16384\)"),
    "a wide MLP": (config(text_config={"intermediate_size": 2**22}), r"up_proj\.weight has shape .*expected \(4194304"),
    "a large vocabulary": (config(text_config={"vocab_size": 2**22}), r"embed_tokens.*expected \(4194304, 32\)"),
    "1000 layers": (config(text_config={"num_hidden_layers": 1000}), "more are missing"),
    "a wide tower": (config(vision_config={"hidden_size": 2**16}), r"patch_embedding.*expected \(65536, 3, 7, 7\)"),
    "16 million patches": (
        config(vision_config={"image_size": 4096, "patch_size": 1}, image_grid_pinpoints=[[4096, 4096]]),
        r"position_embedding\.weight has shape .*expected \(16777216, 32\)",
    ),
    "1000 tower layers": (config(vision_config={"num_hidden_layers": 1000}), "more are missing"),
    "large pinpoints": (config(image_grid_pinpoints=[[28 * 2**20, 28]]), "expected a list of .height, width."),
    "many pinpoints": (config(image_grid_pinpoints=[[28, 28]] * 1001), "expected at most 1000 pairs"),
    "a long list as a field": (config(plan=["x"] * 10**6), "plan=.'x', 'x', .*: expected 'dense' or 'visor'"),
    "a long text as a field": (config(model_type="x" * 10**6), "model_type='x.*expected 'llava_onevision'"),
    "an even kernel": (config(cross_kernel_size=6), "cross_kernel_size=6: expected an odd number"),
    "cross-attention heads": (config(cross_num_key_value_heads=3), "expected a divisor of num_attention_heads, 4"),
    "a VISOR plan of two layers": (config(plan="visor", text_config={"num_hidden_layers": 2}), "at least 3 with plan"),
    "an unknown kind of layer": (config(plan="visor", layer_pattern=["text", "crss"]), "a list of 'text', 'cross'"),
    "a pattern that is no list": (config(plan="visor", layer_pattern="text"), "layer_pattern='text': expected a list"),
    "a pattern without slots": (config(plan="visor", layer_pattern=["cross"]), "at least one 'cross' and one 'self'"),
    "more head layers than layers": (config(plan="visor", head_layers=5), "at least 8 with plan"),
    "a VISOR plan without its layers": (config(plan="visor"), "more are missing"),
    "sliding windows": (config(text_config={"layer_types": ["sliding_attention"] * 7}), "'full_attention' in every"),
    "quantized weights": (config(quantization_config={"load_in_4bit": True}), "expected none: weights that are not"),
    "an index that leads out": (index("../model.safetensors"), "weight_map: expected for each tensor"),
    "an index with an absolute path": (index("/etc/passwd.safetensors"), "weight_map: expected for each tensor"),
    "an index of missing files": (index("gone.safetensors"), r"gone\.safetensors: no such file; the index names it"),
    "an index of 5000 files": (index(*[f"{n}.safetensors" for n in range(5000)]), "5,000 .safetensors; expected at"),
    "pickles only": (pickled, r"no \.safetensors \(pytorch_model\.bin: pickles are never read\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", SIZES)
def test_sizes_and_indices_are_checked_against_the_tensors(saved: dict[str, Path], tmp_path: Path, case: str) -> None:
    change, message = SIZES[case]
    folder = copied(saved["tied"], tmp_path / "folder")
    change(folder)
    refused(folder, message)


def test_code_and_pickles_in_a_models_folder_are_never_run(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(saved["tied"], tmp_path / "folder")
    config(auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"})(folder)
    witness = tmp_path / "ran"
    for name in ("evil.py", "__init__.py", "modeling_evil.py"):
        (folder / name).write_text(f"open({str(witness)!r}, 'w')")
    (folder / "pytorch_model.bin").write_bytes(f"cbuiltins\nopen\n(S'{witness}'\nS'w'\ntR.".encode())
    everything(folder)
    assert not witness.exists()


def test_a_file_of_holes_is_no_file_of_weights(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(saved["tied"], tmp_path / "folder")
    big = 2**30
    raw(f'{{"a": {tensor(shape=[big], offsets=[0, 4 * big])}}}')(folder)
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size + 4 * big)
    if not file.stat().st_blocks:
        pytest.skip("this file system does not count blocks")
    with pytest.raises(RequestError, match=r"bytes long with .* on the disk"):
        locate(folder)
