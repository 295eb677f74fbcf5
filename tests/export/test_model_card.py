"""The model card: valid metadata for the hub, and the sources of license, base model and figures."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard, repocard

from visor_jax.config import from_dict
from visor_jax.config.rules import LICENSES
from visor_jax.config.schema import ExportConfig
from visor_jax.errors import RequestError
from visor_jax.export.model_card import About, about, about_stage, write_card
from visor_jax.export.parity import Comparison, Parity
from visor_jax.hf.origin import MAX_CARD_BYTES, origin_of
from visor_jax.workdir.folder import Workdir

PROVEN = Parity(1e-5, [Comparison("p", "full", "full", 0.0, True)])
ROW = {"easy": 0.5, "hard": 0.25, "tasks": {"a": 0.5, "b": 0.25}, "decoder_gflops": 1.0, "end_to_end_gflops": 2.0}
EVALUATION = {"benchmark": "mine", "split": "test", "stage": "policy", "budgets": {"full": {**ROW, "samples": 8}}}


def check_metadata(data: dict) -> list[str]:
    """Returns the errors in a card's metadata, by those rules of the hub that our cards could violate."""
    wrong = [f"license: {data['license']}"] if data.get("license") not in LICENSES else []
    languages = [data["language"]] if isinstance(data.get("language"), str) else data.get("language", [])
    wrong += [f"language: {code}" for code in languages if not (isinstance(code, str) and 2 <= len(code) <= 3)]
    texts = ("library_name", "pipeline_tag", "base_model")
    wrong += [name for name in texts if name in data and not (isinstance(data[name], str) and data[name])]
    wrong += ["tags"] if not all(isinstance(tag, str) for tag in data.get("tags", [])) else []
    for entry in data.get("model-index", []):
        wrong += ["model-index: name"] if not entry.get("name") else []
        for result in entry["results"]:
            wrong += [f"model-index: {part}" for part in ("task", "dataset") if not result[part].get("type")]
            wrong += ["model-index: dataset name"] if not result["dataset"].get("name") else []
            wrong += ["model-index: value"] if any("value" not in metric for metric in result["metrics"]) else []
    return wrong


class Hub(BaseHTTPRequestHandler):
    """Replaces the hub's `/api/validate-yaml`: status 400 and the errors for invalid metadata."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        wrong = check_metadata(yaml.safe_load(body["content"].split("---")[1]))
        answer = json.dumps({"errors": wrong}).encode() if wrong else b"{}"
        self.send_response(400 if wrong or self.path != "/api/validate-yaml" else 200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    session = repocard.get_session()

    def post(url: str, **arguments):
        return session.post(
            url.replace("https://huggingface.co", f"http://127.0.0.1:{server.server_port}"), **arguments
        )

    # huggingface_hub 1.x does not use constants.ENDPOINT here: the address is in the call.
    monkeypatch.setattr(repocard, "get_session", lambda: SimpleNamespace(post=post))
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "known", [About(), About("mit", "someone/base", ("en", "de"), EVALUATION)], ids=["own", "based"]
)
def test_card_holds_its_metadata_and_validates(jax_model, tmp_path, hub, known):
    write_card(tmp_path / "README.md", jax_model, PROVEN, known, stage="policy", dtype="float32")
    card = ModelCard.load(tmp_path / "README.md")
    card.validate()
    data = card.data.to_dict()
    assert data["license"] == known.license and data["language"] == list(known.languages)
    assert data.get("base_model", "") == known.base_model
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "image-text-to-text")
    assert {"visor", "custom_code"} <= set(data["tags"])
    assert f"license of the weights: {known.license}" in card.text
    if known.evaluation:
        (result,) = card.data.eval_results
        assert (result.dataset_name, result.metric_type, result.metric_value) == ("mine", "accuracy", 0.375)
        assert "| `full` | 0.375 | 1 | 2 |" in card.text
    assert "torchvision backend" in card.text


def test_the_stand_in_refuses_what_the_hub_does(jax_model, tmp_path, hub):
    write_card(tmp_path / "README.md", jax_model, PROVEN, About("mine"), stage="policy", dtype="float32")
    with pytest.raises(ValueError, match="license: mine"):
        ModelCard.load(tmp_path / "README.md").validate()


@pytest.mark.parametrize(
    ("settings", "origin", "expected"),
    [
        ({}, {}, ("apache-2.0", "")),
        ({"license": "mit", "base_model": ""}, {"license": "gemma", "base_model": "a/b"}, ("mit", "a/b")),
        ({"license": "", "base_model": "c/d"}, {"license": "gemma", "base_model": "a/b"}, ("gemma", "c/d")),
        ({"base_model": "c/d"}, {}, ("unknown", "c/d")),
    ],
)
def test_license_and_base_model(settings, origin, expected):
    known = about(ExportConfig(**settings), origin, {})
    assert (known.license, known.base_model) == expected


def test_a_base_model_is_identified_by_its_card_and_path(tmp_path):
    assert origin_of(tmp_path) == {}
    (tmp_path / "README.md").write_text("---\nlicense: mit\nbase_model: a/b\n---\n# B\n")
    assert origin_of(tmp_path) == {"license": "mit", "base_model": "a/b"}
    snapshot = tmp_path / "models--lab--name" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: [no\n---\n")
    assert origin_of(snapshot) == {"base_model": "lab/name"}
    (snapshot / "README.md").write_text("x" * (MAX_CARD_BYTES + 1))
    assert origin_of(snapshot) == {"base_model": "lab/name"}


def workdir_with(path: Path, complete: dict, evaluation: dict | None = None) -> Workdir:
    workdir = Workdir(path)
    workdir.create()
    (path / "base").mkdir()
    (path / "base" / "complete.json").write_text(json.dumps(complete))
    if evaluation:
        (path / "eval").mkdir()
        (path / "eval" / "test.json").write_text(json.dumps(evaluation))
    return workdir


def test_about_a_workdirs_stages(tmp_path):
    own = workdir_with(tmp_path / "own", {"step": 4}, EVALUATION)
    assert about_stage(ExportConfig(), own, "policy") == About(evaluation=EVALUATION)
    assert about_stage(ExportConfig(), own, "full") == About()  # the figures belong to another stage
    imported = {"step": 0, "imported": True}
    origin = {"license": "mit", "base_model": "a/b"}
    based = workdir_with(tmp_path / "based", {**imported, "origin": origin})
    assert about_stage(ExportConfig(), based, "policy") == About("mit", "a/b")
    assert about_stage(ExportConfig(), workdir_with(tmp_path / "older", imported), "policy") == About("unknown")


def test_unknown_licenses_are_refused_before_anything_runs():
    assert from_dict({"export": {"license": "mit"}}).export.license == "mit"
    with pytest.raises(RequestError, match=r"export\.license"):
        from_dict({"export": {"license": "apache"}})
