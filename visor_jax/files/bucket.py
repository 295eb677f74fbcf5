"""Files in a bucket (`gs://BUCKET/NAME`), where nothing can be renamed, appended to or locked.

Imports no JAX. In: paths of `etils.epath`. Whole objects are written and read through gcsfs (the extra `gcs`). What has
to be atomic, a lock, goes through tensorstore instead, which writes an object only if it has not changed since.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from visor_jax.errors import RequestError, one_line
from visor_jax.files.leftovers import remove_leftovers_of, temporary_name

PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}
EXTRAS = {"gs": "visor-jax[gcs]"}
# tensorstore's retries for a lock; by default it would retry for minutes.
_RETRIES = {"max_retries": 4, "initial_delay": "500ms", "max_delay": "4s"}
UNFINISHED = ".unfinished"  # an object in a folder that is being uploaded
# Modules of the packages that reach a bucket; their own exceptions are not `OSError`s.
_MODULES = ("gcsfs.", "aiohttp.", "google.auth.", "google.api_core.", "google.cloud.", "s3fs.", "botocore.", "azure.")


def is_bucket(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is in a bucket."""
    return "://" in os.fspath(path)


def check_scheme(scheme: str) -> None:
    """Checks that a kind of bucket can be read here, and configures the package that does it.

    Raises:
      RequestError: the kind is unknown, or its package is not installed.
    """
    if scheme not in PACKAGES:
        known = ", ".join(f"{name}://" for name in PACKAGES)
        raise RequestError(f"{scheme}://: unknown kind of bucket; expected a local path, or one of {known}")
    import fsspec
    from etils.epath import gpath
    from fsspec.config import conf

    # Where TensorFlow is installed etils would use it, which imports it and takes the accelerator's memory.
    os.environ["EPATH_USE_TF"] = "false"
    getattr(getattr(gpath, "_is_tf_installed", None), "cache_clear", lambda: None)()  # it may have looked already

    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        package = PACKAGES[scheme]
        raise RequestError(
            f"{scheme}://: needs the package {package}, which is not installed: pip install"
            f" {EXTRAS.get(scheme, package)!r}"
        ) from error
    # A cached listing would hide what tensorstore, another process or another machine has written since.
    for protocol in (scheme, "gcs") if scheme == "gs" else (scheme,):
        conf.setdefault(protocol, {})["use_listings_cache"] = False


@contextlib.contextmanager
def bucket_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns the errors of the packages that reach a bucket into `OSError`s that name the path."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise
        missing, forbidden = isinstance(error, FileNotFoundError), str(error).startswith("Forbidden")
        number = errno.ENOENT if missing else errno.EACCES if forbidden else errno.EIO
        reason = "No such bucket or object" if missing else one_line(str(error))
        raise OSError(number, reason, os.fspath(path)) from error
    except Exception as error:
        if not is_bucket_error(error):
            raise
        number = errno.EACCES if getattr(error, "code", None) in (401, 403) else errno.EIO
        raise OSError(number, describe(error), os.fspath(path)) from error


def is_bucket_error(error: BaseException) -> bool:
    """Returns whether an exception comes from a package that reaches a bucket."""
    return f"{type(error).__module__}.".startswith(_MODULES)


def describe(error: BaseException) -> str:
    """Returns an exception's kind and message as one line."""
    return one_line(f"{type(error).__name__}: {error}")


def make_folder(folder: Path) -> None:
    """Creates a local folder and its parents; a bucket has no folders, only names that contain "/"."""
    if not is_bucket(folder):
        folder.mkdir(parents=True, exist_ok=True)


def names_below(folder: Path) -> list[str]:
    """Returns the names of all objects below a folder of a bucket, relative to it, sorted."""
    from etils.epath import backend

    names = []
    with bucket_errors(folder):
        for name in backend.fsspec_backend.fs(folder).find(os.fspath(folder)):
            names.append(name.partition(os.fspath(folder).partition("://")[2].rstrip("/") + "/")[2])
    return sorted(name for name in names if name)


def size_of(path: Path) -> int:
    """Returns the bytes of a file or of a bucket's object.

    Raises:
      OSError: it does not exist.
    """
    if not is_bucket(path):
        return path.stat().st_size
    with bucket_errors(path):
        return cast(Any, path.stat()).length


@contextlib.contextmanager
def uploaded_folder(target: Path, last: str, progress: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Yields a new temporary folder, whose files become the only objects below `target` if the block succeeds.

    They do not appear at once, so the file `last` is removed first and written last: where it exists, all of them do.
    Until then an object named `UNFINISHED` marks the folder as one that an upload may replace. The temporary
    folder of a killed process is removed first.

    Args:
      target: a folder of a bucket.
      last: name of the file that completes the folder.
      progress: called before each upload of a file.

    Raises:
      OSError: the local disk or the bucket cannot be written.
    """
    from etils.epath import backend

    temporary = Path(tempfile.gettempdir()) / "visor_upload"
    remove_leftovers_of(temporary)
    folder = temporary.with_name(temporary_name(temporary.name, "partial"))
    folder.mkdir(mode=0o700)
    try:
        yield folder
        files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        system = backend.fsspec_backend.fs(target)
        with bucket_errors(target):
            (target / UNFINISHED).write_bytes(b"")
            (target / last).unlink(missing_ok=True)
            for old in set(names_below(target)) - {*files, UNFINISHED}:
                (target / old).unlink(missing_ok=True)
            for file in [*(file for file in files if file != last), last]:
                progress()
                system.put_file(os.fspath(folder / file), os.fspath(target / file))
            (target / UNFINISHED).unlink(missing_ok=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --- objects that several machines change -----------------------------------------------------------------------------


class SharedObject:
    """One object of a `gs://` bucket that is replaced only if it has not changed since it was read.

    Raises (all methods):
      OSError: the bucket cannot be reached, does not exist, or does not admit the operation.
    """

    def __init__(self, path: Path) -> None:
        """
        Raises:
          RequestError: the bucket is of another kind, whose objects cannot be created only if absent.
        """
        scheme, _, rest = os.fspath(path).partition("://")
        if scheme != "gs":
            raise RequestError(f"{path}: a run's folder cannot be in {scheme}://; expected gs:// or a local folder")
        self._path, (self._bucket, _, self._name) = path, rest.partition("/")
        self._store: Any = None

    def read(self) -> tuple[bytes | None, bytes]:
        """Returns (content, or None if the object does not exist; the generation, for `write`)."""
        result = self._call("read", self._name)
        return (bytes(result.value) if result.state == "value" else None), result.stamp.generation

    def write(self, data: bytes | None, generation: bytes) -> bool:
        """Replaces the object if its generation is still this one (absent is a generation too); None removes it.

        Returns:
          Whether it was replaced.
        """
        return bool(self._call("write", self._name, data, if_equal=generation).generation)

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        import tensorstore

        try:
            if self._store is None:
                spec = {"driver": "gcs", "bucket": self._bucket, "context": {"gcs_request_retries": _RETRIES}}
                self._store = tensorstore.KvStore.open(spec).result()
            return cast(Any, getattr(self._store, method)(*arguments, **options).result())
        except ValueError as error:  # of every kind: tensorstore's messages begin with their status
            status, _, reason = " ".join(str(error).split()).partition(": ")
            numbers = {"NOT_FOUND": errno.ENOENT, "PERMISSION_DENIED": errno.EACCES, "UNAUTHENTICATED": errno.EACCES}
            message = f"{status}: {reason.partition(' [')[0]}"
            raise OSError(numbers.get(status, errno.EIO), message, os.fspath(self._path)) from error
