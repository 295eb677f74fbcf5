"""Where a folder is expected, a model's name on the Hugging Face hub: `ORG/NAME`, `ORG/NAME@REVISION`.

In: what somebody gave as a model. Out: a local folder: the one that was named, or the hub's files in the cache of
`huggingface_hub`. What lies here wins over the hub, a path whose first part is a folder here is never looked for there
(`hf://ORG/NAME` always is), and only JSON and safetensors are downloaded: no code, no pickles.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from visor_jax.errors import RequestError, RunError, nearest

log = logging.getLogger(__name__)
FILES = (  # all that this package reads of a model
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
    """`path` as it is, or, where it can only be a model's name on the hub, the folder of its downloaded files.

    Raises:
      RequestError: the hub has no such model or revision, does not give it to us, or cannot be reached and the model is
        not in its cache.
      RunError: the hub answers with an error of its own, or the disk does not take the files.
    """
    text = os.fspath(path)
    named = _ID.fullmatch(text)
    if named is None:
        if text.startswith("hf://"):
            raise RequestError(f"{text}: expected hf://ORG/NAME or hf://ORG/NAME@REVISION")
        return path
    here = os.path.lexists(text) or os.path.isdir(named["repo"].partition("/")[0])
    return path if here and not named["scheme"] else Path(_download(text, named["repo"], named["revision"]))


def hint(path: Path) -> str:
    """What may help where there is no `path`: names beside it, and how to mean the hub; "" or text after "; "."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        names = []
    hints = [nearest(path.name, names)]
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
    """Says in one line why there is no folder, for somebody who meant the hub or who mistyped a path.

    Returns where the error is none of the hub's, of the network's or of the disk's.
    """
    from huggingface_hub import constants, errors

    missing = f"{name}: no such folder here, and"
    token = "set HF_TOKEN to a token that may read it (or log in with: hf auth login)"
    if isinstance(error.__cause__, errors.HfHubHTTPError):
        error = error.__cause__  # it found nothing in the cache either
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
    from_network = type(error).__module__.partition(".")[0] in ("httpx", "httpx2")  # by version of huggingface_hub
    if from_network or isinstance(error, errors.LocalEntryNotFoundError | ConnectionError):
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{hub} cannot be reached"
        raise RequestError(
            f"{missing} {reason}; for a model of the hub, download it first, into {cache}, with: hf download {repo}"
        ) from error
    if isinstance(error, OSError):
        raise RunError(f"{name}: cannot be written to the hub's cache {cache}: {error}") from error
