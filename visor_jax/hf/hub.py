"""Resolves a model's name on the Hugging Face hub (`ORG/NAME`, `ORG/NAME@REVISION`) to a local folder.

In: the path or name that the user gave, also of a checkpoint that the package contains (`visor_jax.config.shipped`).
Out: the local folder of that path, or the downloaded files in the cache of `huggingface_hub`. Local paths take
precedence: a path whose first part is a local folder is never looked up on the hub; `hf://ORG/NAME` always is. Only
JSON and safetensors files are downloaded: no code, no pickles.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from visor_jax.config.shipped import SHIPPED, shipped_folder
from visor_jax.errors import RequestError, RunError, nearest

log = logging.getLogger(__name__)
FILES = (  # every file of a model that this package reads
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "model.safetensors.index.json",
    "model*.safetensors",  # not other formats of the same weights
)
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_ID = re.compile(rf"(?P<scheme>hf://)?(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]{{0,199}}))?")


def local_folder(path: str | Path) -> str | Path:
    """Returns the local folder of a model: a local path unchanged, a shipped checkpoint's or a downloaded one's.

    Raises:
      RequestError: the shipped checkpoint is missing, or the hub has no such model or revision, denies access, or
        cannot be reached while the model is not cached.
      RunError: the hub fails, or the files cannot be written.
    """
    text = os.fspath(path)
    if text in SHIPPED and not os.path.lexists(text):
        return shipped_folder(text)
    match = _ID.fullmatch(text)
    if match is None:
        if text.startswith("hf://"):
            raise RequestError(f"{text}: expected hf://ORG/NAME or hf://ORG/NAME@REVISION")
        return path
    is_local = os.path.lexists(text) or os.path.isdir(match["repo"].partition("/")[0])
    return path if is_local and not match["scheme"] else Path(_download(text, match["repo"], match["revision"]))


def hint(path: Path) -> str:
    """Returns hints for a missing `path`: similar names next to it, and the hub syntax; "" or begins with "; "."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        names = []
    hints = [nearest(path.name, [*names, *SHIPPED])]
    if _ID.fullmatch(os.fspath(path)):
        hints.append(f"for a model of the hub, since the folder {path.parts[0]!r} is here, write hf://{path}")
    return "".join(f"; {text}" for text in hints if text)


def _download(name: str, repo: str, revision: str | None) -> str:
    from huggingface_hub import constants, snapshot_download

    try:
        folder = snapshot_download(repo, revision=revision, allow_patterns=list(FILES), ignore_patterns=["*/*"])
    except Exception as error:
        _refuse(name, repo, constants.ENDPOINT, error)
        raise
    log.info("%s: revision %s of %s, in %s", name, Path(folder).name, constants.ENDPOINT, folder)
    return folder


def _refuse(name: str, repo: str, hub: str, error: Exception) -> None:
    """Raises a one-line error for a failed download; the user may have meant the hub or mistyped a path.

    Returns without raising if the error does not come from the hub, the network or the disk.
    """
    from huggingface_hub import constants, errors

    missing = f"{name}: no such folder here, and"
    token = "set HF_TOKEN to a token that may read it (or log in with: hf auth login)"
    if isinstance(error.__cause__, errors.HfHubHTTPError):
        error = error.__cause__  # raised because the cache has no copy either
    if isinstance(error, errors.GatedRepoError):
        raise RequestError(f"{name}: is gated; accept its terms at {hub}/{repo}, then {token}") from error
    if isinstance(error, errors.RevisionNotFoundError):
        raise RequestError(f"{name}: no such revision at {hub}/{repo}; expected a branch, a tag or a commit") from error
    if isinstance(error, errors.RepositoryNotFoundError):
        raise RequestError(f"{missing} no such model at {hub}; if it is private, {token}") from error
    if isinstance(error, errors.HFValidationError):
        raise RequestError(f"{missing} no name of a model on the hub: expected ORG/NAME") from error
    if isinstance(error, errors.HfHubHTTPError):
        raise RunError(f"{name}: {hub} answers {error.response.status_code}; try again later") from error
    cache = constants.HF_HUB_CACHE
    # The HTTP library depends on the version of huggingface_hub.
    from_network = type(error).__module__.partition(".")[0] in ("httpx", "httpx2")
    if from_network or isinstance(error, errors.LocalEntryNotFoundError | ConnectionError):
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{hub} cannot be reached"
        raise RequestError(
            f"{missing} {reason}; for a model of the hub, download it first, into {cache}, with: hf download {repo}"
        ) from error
    if isinstance(error, OSError):
        raise RunError(f"{name}: cannot be written to the hub's cache {cache}: {error}") from error
