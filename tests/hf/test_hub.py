"""Models by their name on the hub, with a small local server that implements the hub's protocol.

Each case runs in a separate process, because `huggingface_hub` reads its environment when it is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from visor_jax.errors import RequestError
from visor_jax.hf import hub

COMMIT = "1" * 40
REFUSED = {  # repository -> status, code
    "org/gated": (403, "GatedRepo"),
    "org/missing": (401, "RepoNotFound"),
    "org/broken": (404, ""),
    "org/teapot": (418, ""),
}
NOT_OURS = (
    "pytorch_model.bin",
    "modeling_evil.py",
    "README.md",
    "consolidated.safetensors",
    "onnx/config.json",
    "onnx/a.safetensors",
)


class Handler(BaseHTTPRequestHandler):
    """The endpoints of a download: revisions, the list of files, and each file (HEAD and GET)."""

    folder: Path
    requested: list[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        repo = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        if repo in REFUSED or f"/{'9' * 8}" in path:
            status, code = REFUSED.get(repo, (404, "RevisionNotFound"))
            return self.send(status, b"", {"X-Error-Code": code} if code else {})
        files = {file.relative_to(self.folder).as_posix(): file for file in self.folder.rglob("*") if file.is_file()}
        if path.startswith("/api/models") and "/tree/" in path:
            listed = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": oid(file)}
                for name, file in files.items()
            ]
            return self.send(200, json.dumps(listed).encode())
        if path.startswith("/api/models"):
            siblings = [{"rfilename": name} for name in files]
            return self.send(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())
        name = path.partition(f"/resolve/{COMMIT}/")[2]
        self.requested.append(name)
        headers = {"ETag": f'"{oid(files[name])}"', "X-Repo-Commit": COMMIT}
        return self.send(200, files[name].read_bytes(), headers, body)

    def send(self, status: int, content: bytes, headers: dict[str, str] | None = None, body: bool = True) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


def oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def server(saved: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A hub with one model under any name, and files that must not be downloaded."""
    folder = tmp_path_factory.mktemp("hub_files")
    for file in saved["tied"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for name in NOT_OURS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("print('never')")
    handler = type("OurHandler", (Handler,), {"folder": folder, "requested": []})
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield SimpleNamespace(
        url=f"http://127.0.0.1:{running.server_port}", requested=handler.requested, folder=saved["tied"]
    )
    running.shutdown()
    running.server_close()


LOCATE = """
import sys
from visor_jax.errors import RequestError, RunError
from visor_jax.hf.hub import local_folder
for name in sys.argv[1:]:
    try:
        print(local_folder(name))
    except (RequestError, RunError) as error:
        print(type(error).__name__, error)
"""


def run(script: str, *arguments: str, folder: Path, url: str, **environment: str) -> list[str]:
    """Returns the lines that `script` prints in a process with the hub at `url`, in the working folder `folder`."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    variables |= {"HF_ENDPOINT": url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1", "no_proxy": "*"}
    command = [sys.executable, "-c", script, *arguments]
    variables |= {"JAX_PLATFORMS": "cpu", "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_only_json_and_safetensors_are_taken_and_offline_finds_them_again(
    server: SimpleNamespace, tmp_path: Path
) -> None:
    names = ["org/model", "org/model@main", "hf://org/model@refs/pr/1", f"org/model@{COMMIT}"]
    folders = run(LOCATE, *names, folder=tmp_path, url=server.url)
    assert len(set(folders)) == 1
    taken = {file.name for file in Path(folders[0]).rglob("*")}
    assert {"config.json", "tokenizer.json", "model.safetensors", "preprocessor_config.json"} <= taken
    assert not {Path(name).name for name in NOT_OURS[:4]} & taken and "onnx" not in taken
    assert not set(NOT_OURS) & set(server.requested)
    offline = run(LOCATE, "org/model", folder=tmp_path, url=server.url, HF_HUB_OFFLINE="1")
    assert offline == folders[:1]


def test_refusals_of_the_hub_are_reported_in_one_line(server: SimpleNamespace, tmp_path: Path) -> None:
    names = ["org/gated", "org/missing", "org/model@99999999", "org/teapot", "hf://org", "hf://a--b/c", "org/x.git"]
    lines = run(LOCATE, *names, folder=tmp_path, url=server.url)
    expected = [
        f"RequestError org/gated: is gated; accept its terms at {server.url}/org/gated, then set HF_TOKEN",
        f"RequestError org/missing: no such folder here, and no such model at {server.url}; if it is",
        f"RequestError org/model@99999999: no such revision at {server.url}/org/model",
        f"RunError org/teapot: {server.url} answers 418",
        "RequestError hf://org: expected hf://ORG/NAME",
        "RequestError hf://a--b/c: no such folder here, and no name of a model on the hub",
        "RequestError org/x.git: no such folder here, and no name of a model on the hub",
    ]
    assert len(lines) == len(expected)
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(start)


def test_without_a_network_or_offline_one_line_says_what_to_do(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"  # a port without a server
        lines = run(LOCATE, "runs/small_modl", folder=tmp_path, url=url)
    assert len(lines) == 1
    start = f"RequestError runs/small_modl: no such folder here, and {url} cannot be reached; for a model of the hub,"
    assert lines[0].startswith(start) and lines[0].endswith("with: hf download runs/small_modl")
    lines = run(LOCATE, "runs/small_modl", folder=tmp_path, url=url, HF_HUB_OFFLINE="1")
    assert len(lines) == 1 and "no such folder here, and HF_HUB_OFFLINE is set; for a model of the hub" in lines[0]


LOAD_AND_IMPORT = """
import sys
import numpy as np
import visor_jax
from visor_jax.__main__ import main
name, folder, config = sys.argv[1:]
assert visor_jax.__name__ == "visor_jax"
ours, theirs = visor_jax.load(name), visor_jax.load(folder)
tokens = [5, 6, 7, 8]
np.testing.assert_array_equal(ours.logits(tokens, []), theirs.logits(tokens, []))
print(main(["import", "--from", name, "--workdir=run", f"--config={config}", "--config.tokenizer.path=almanac"]))
"""
CONFIG = """
from visor_jax.config import default_config

def get_config():
    config = default_config()
    config.stages = ("dense",)
    config.model.plan = "dense"
    config.model.text.update(
        vocab_size={vocab}, hidden_size=32, intermediate_size=48, num_layers=7, num_heads=4, num_kv_heads=2, head_dim=8,
        rms_norm_eps=1e-5, rope_theta=5e4, tie_word_embeddings=True,
    )
    config.model.vision.update(
        tile_size=28, patch_size=7, hidden_size=32, intermediate_size=40, num_layers=2, num_heads=4
    )
    config.model.anyres.update(
        pinpoints="(1x1),...,(3x3)", max_tiles=4, image_mean=(0.4, 0.5, 0.6), image_std=(0.3, 0.25, 0.2)
    )
    config.data.update(source="llava", path="train.json", tiles=10)
    return config
"""


def test_a_hub_name_stands_for_a_folder_in_load_and_import(server: SimpleNamespace, tmp_path: Path) -> None:
    vocabulary = json.loads((server.folder / "config.json").read_text())["text_config"]["vocab_size"]
    (tmp_path / "config.py").write_text(CONFIG.replace("{vocab}", str(vocabulary)))
    arguments = ("org/model@main", str(server.folder), "config.py")
    assert run(LOAD_AND_IMPORT, *arguments, folder=tmp_path, url=server.url)[-1] == "0"
    assert (tmp_path / "run" / "base" / "complete.json").exists()


def test_what_lies_here_is_never_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "small_model").mkdir(parents=True)
    monkeypatch.setattr(hub, "_download", lambda *arguments: pytest.fail("asked the hub"))
    for path in ("runs/small_model", "runs/small_modl", "a/b/c", "/a/b", "./a/b", "~/a", "a", "gs://a/b", "../a/b"):
        assert hub.local_folder(path) == path
    assert hub.local_folder(Path("runs/other")) == Path("runs/other")
    lines = hub.hint(Path("runs/small_modl"))
    assert lines.startswith(
        "; did you mean 'small_model'?; for a model of the hub, since the folder 'runs' is here, write"
    )
    assert hub.hint(tmp_path / "none" / "none") == ""
    with pytest.raises(RequestError, match="expected hf://ORG/NAME"):
        hub.local_folder("hf://a")
