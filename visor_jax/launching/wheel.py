"""The package as a wheel, for machines that are to run exactly what is installed here.

From a checkout of the repository (also one installed in editable mode) `pip wheel` builds it. An installed wheel is
packed again from its own files: `python -m visor_jax.launching.wheel FOLDER`.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import sys
import zipfile
from importlib import metadata
from pathlib import Path, PurePosixPath

import visor_jax
from visor_jax.errors import RequestError
from visor_jax.launching.steps import Command, Runner

DISTRIBUTION = "visor-jax"
FILE = f"visor_jax-{visor_jax.__version__}-py3-none-any.whl"
# Written by the installer about this installation; not part of the wheel.
INSTALLED_ONLY = ("INSTALLER", "REQUESTED", "RECORD", "direct_url.json")
# Machines that are asked for again later, or in another place, compute with the same versions.
PINNED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "ml-collections", "numpy")
EPOCH = (1980, 1, 1, 0, 0, 0)  # so that the same files give the same wheel


def build(runner: Runner) -> Path:
    """Makes the wheel in the launch's folder and returns its path.

    setuptools' intermediate files go to that folder too, so that a stale `build/` cannot get into the wheel.
    """
    source, folder = Path(visor_jax.__file__).resolve().parents[1], runner.folder
    if (source / "pyproject.toml").is_file():
        places = f"[build]\nbuild_base = {(folder / 'build').absolute()}\n[egg_info]\negg_base = {folder.absolute()}\n"
        extra = runner.write("setuptools.cfg", places)
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps")
        argv = (*pip, "--no-build-isolation", f"--wheel-dir={folder}", str(source))
        runner.run(Command(argv, "build the wheel", environment=(("DIST_EXTRA_CONFIG", str(extra.absolute())),)))
    else:
        argv = (sys.executable, "-m", "visor_jax.launching.wheel", str(folder))
        runner.run(Command(argv, "pack the installed package as a wheel"))
    return folder / FILE


def pins() -> list[str]:
    """Returns what pip is told beside the wheel: the versions here of the packages that results depend on."""
    return [f"{package}=={metadata.version(package)}" for package in PINNED]


def pack(folder: Path) -> Path:
    """Writes the installed package as a wheel into `folder` and returns its path.

    Raises:
      RequestError: the package is not installed from a wheel, or a file of it is missing.
    """
    try:
        files = metadata.files(DISTRIBUTION) or []
    except metadata.PackageNotFoundError as error:
        raise RequestError(f"{DISTRIBUTION}: not installed; expected an installed wheel or a checkout") from error
    content: dict[str, bytes] = {}
    for file in files:
        path = PurePosixPath(file.as_posix())
        if path.is_absolute() or ".." in path.parts or "__pycache__" in path.parts or path.name in INSTALLED_ONLY:
            continue  # scripts outside the package are made again from its entry points
        content[str(path)] = Path(str(file.locate())).read_bytes()
    if "visor_jax/__init__.py" not in content:
        raise RequestError(f"{DISTRIBUTION}: its installation lists no files; install the wheel, or use a checkout")
    information = next(PurePosixPath(name).parent for name in content if name.endswith(".dist-info/WHEEL"))
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / FILE
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(content):
            archive.writestr(zipfile.ZipInfo(name, EPOCH), content[name], zipfile.ZIP_DEFLATED)
        record = zipfile.ZipInfo(f"{information}/RECORD", EPOCH)
        archive.writestr(record, _record(content, record.filename), zipfile.ZIP_DEFLATED)
    return target


def _record(content: dict[str, bytes], own: str) -> str:
    """Returns the table of files, checksums and sizes that a wheel holds."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for name in sorted(content):
        checksum = base64.urlsafe_b64encode(hashlib.sha256(content[name]).digest()).rstrip(b"=").decode("ascii")
        writer.writerow([name, f"sha256={checksum}", len(content[name])])
    writer.writerow([own, "", ""])
    return text.getvalue()


if __name__ == "__main__":
    print(pack(Path(sys.argv[1])))
