"""Checks the names that a launch passes to clients and writes into manifests and scripts.

Every name is restricted to characters that no shell, YAML or URL treats specially, so that a name cannot become code.
Free text (values of `--config.field=value`) is not restricted: it is quoted where it is used. A message repeats the
value, except for a secret.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from visor_jax.errors import RequestError, nearest, short

NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
ZONE = re.compile(r"[a-z]{2,12}-[a-z]{2,16}\d{1,2}-(ai\d{1,2})?[a-z]")
PROJECT = re.compile(r"[a-z][-a-z0-9]{4,28}[a-z0-9]")
BUCKET = re.compile(r"[a-z0-9]([-._a-z0-9]{1,61})[a-z0-9]")
PATH = re.compile(r"[A-Za-z0-9._+=@,/-]+")
SECRET = re.compile(r"[A-Z][A-Z0-9_]{0,62}")
ACCOUNT = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?@[a-z0-9]([-a-z0-9.]{0,98}[a-z0-9])?\.gserviceaccount\.com")
LABEL_KEY, LABEL_VALUE = re.compile(r"[a-z][-_a-z0-9]{0,62}"), re.compile(r"[-_a-z0-9]{0,63}")
WORD = re.compile(r"[A-Za-z0-9]([-._A-Za-z0-9]{0,61}[A-Za-z0-9])?")  # queues, partitions, reservations
CONTEXT = re.compile(r"[A-Za-z0-9]([-._:@/A-Za-z0-9]{0,126}[A-Za-z0-9])?")  # gke_PROJECT_LOCATION_CLUSTER
_HOST, _PART = r"[a-z0-9]+([.-][a-z0-9]+)*(:\d{1,5})?", r"[a-z0-9]+([._-]+[a-z0-9]+)*"
IMAGE = re.compile(rf"({_HOST}/)?{_PART}(/{_PART})*(:[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}})?(@sha256:[0-9a-f]{{64}})?")
# Variables that the launch, a shell, Python or JAX reads: a secret of this name would replace them.
TAKEN = re.compile(
    r"PATH|HOME|SHELL|USER|IFS|TMPDIR|PYTHON[A-Z]*|(BASH|CUDA|JAX|LD|LIBTPU|MEGASCALE|SLURM|TPU|VISOR|XLA)_.*"
)
# What keys of known services look like; none of them is a value that a run needs on a command line.
KEYS = re.compile(
    r"hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AIza[A-Za-z0-9_-]{30,}|ya29\.[\w.-]{20,}"
    r"|AKIA[A-Z0-9]{16}|-----BEGIN|xox[abps]-[A-Za-z0-9-]{10,}"
)


def check_name(name: str) -> str:
    """Returns the name of a launch: also that of the queued resource, nodes, job, unit and label.

    Raises:
      RequestError: other characters, or more than 40.
    """
    return _matching(
        "--name", name, NAME, "1 to 40 of a-z, 0-9 and -, beginning with a letter, ending with a letter or digit",
        re.sub(r"[^a-z0-9]+", "-", name.lower() if name.isascii() else "").lstrip("-0123456789")[:40].rstrip("-"),
    )  # fmt: skip


def check_zone(zone: str, known: Iterable[str] = ()) -> str:
    """Returns a zone of Google Cloud, by its form; `machines.check_zone_of` knows where TPUs are.

    Args:
      known: zones that a message may suggest.

    Raises:
      RequestError: no zone has such a name.
    """
    hint = nearest(zone[:40], known)
    return _matching("--zone", zone, ZONE, "a zone, such as us-east5-b" + (f"; {hint}" if hint else ""), "")


def check_project(project: str) -> str:
    """Returns the id of a project.

    Raises:
      RequestError: no project can have this id.
    """
    return _matching(
        "--project", project, PROJECT, "a project's id: 6 to 30 of a-z, 0-9 and -, beginning with a letter", ""
    )


def check_image(image: str) -> str:
    """Returns the name of a container image, with a tag or digest.

    Raises:
      RequestError: it is not a name of an image.
    """
    if len(image) > 255:
        raise RequestError(f"--image={short(image)}: expected at most 255 characters")
    return _matching("--image", image, IMAGE, "[HOST/]PATH[:TAG][@sha256:DIGEST], such as eu.gcr.io/p/visor:1", "")


def check_service_account(account: str) -> str:
    """Returns the e-mail address of a service account.

    Raises:
      RequestError: it is not an address in gserviceaccount.com.
    """
    expected = "an address such as trainer@PROJECT.iam.gserviceaccount.com"
    return _matching("--service-account", account, ACCOUNT, expected, "")


def check_secret(secret: str) -> str:
    """Returns the name of a secret, which is also the variable that the run gets.

    Raises:
      RequestError: it is not a name, or holds a value; the message does not repeat it.
    """
    name, equals, _ = secret.partition("=")
    if equals and SECRET.fullmatch(name):
        raise RequestError(
            f"--secret={name}=...: expected the name alone, because other users see a command line; store the value"
            " with the target's secret manager and give --secret=" + name
        )
    if not SECRET.fullmatch(secret):
        raise RequestError(
            "--secret: expected the name of a secret, such as HF_TOKEN: 1 to 63 of A-Z, 0-9 and _, beginning with a"
            " letter; never its value (not repeated here)"
        )
    if TAKEN.fullmatch(secret):
        raise RequestError(f"--secret={secret}: expected another name; the run needs the variable {secret} itself")
    return secret


def check_label(label: str) -> tuple[str, str]:
    """Returns key and value of `key=value`.

    Raises:
      RequestError: other characters, or more than 63.
    """
    key, equals, value = label.partition("=")
    if not equals or not LABEL_KEY.fullmatch(key) or not LABEL_VALUE.fullmatch(value):
        raise RequestError(f"--label={short(label)}: expected KEY=VALUE of a-z, 0-9, - and _, at most 63 each")
    return key, value


def check_bucket(bucket: str, flag: str = "--bucket") -> str:
    """Returns the name of a bucket, without gs://.

    Raises:
      RequestError: no bucket can have this name.
    """
    if bucket.startswith("gs://"):
        return check_bucket(bucket.removeprefix("gs://").removesuffix("/"), flag)
    if ".." in bucket:
        raise RequestError(f"{flag}={short(bucket)}: a bucket's name has no '..'")
    return _matching(flag, bucket, BUCKET, "a bucket's name: 3 to 63 of a-z, 0-9, -, _ and .", "")


def check_workdir(workdir: str) -> str:
    """Returns a run's folder on the machines: `gs://BUCKET/PATH` or an absolute path.

    Raises:
      RequestError: another form, `..`, or characters that a shell or a URL treats specially.
    """
    expected = "gs://BUCKET/PATH or an absolute path, of letters, digits and . _ + = @ , - /"
    bucket, path = "", workdir
    if workdir.startswith("gs://"):
        bucket, _, path = workdir.removeprefix("gs://").partition("/")
        check_bucket(bucket, "--workdir")
        path = "/" + path
    if not path.startswith("/") or not path.strip("/") or not PATH.fullmatch(path) or len(workdir) > 512:
        raise RequestError(f"--workdir={short(workdir)}: expected {expected}")
    if {".", ".."} & set(path.split("/")) or "//" in path or max(map(len, path.split("/"))) > 200:
        raise RequestError(
            f"--workdir={short(workdir)}: expected {expected}, without '..', '.' and '//', names of at most 200"
        )
    return f"gs://{bucket}{path.rstrip('/')}" if bucket else str(PurePosixPath(path))


def check_word(flag: str, word: str) -> str:
    """Returns the name of a queue, partition or reservation.

    Raises:
      RequestError: other characters, or more than 63.
    """
    return _matching(flag, word, WORD, "1 to 63 of letters, digits, '-', '_' and '.'", "")


def check_context(context: str) -> str:
    """Returns the name of one of kubectl's contexts.

    Raises:
      RequestError: other characters, or more than 128.
    """
    return _matching("--cluster", context, CONTEXT, "a context of kubectl, such as gke_PROJECT_LOCATION_CLUSTER", "")


def check_choice(flag: str, value: str, choices: tuple[str, ...]) -> str:
    """Raises:
    RequestError: the value is not one of the choices; names the nearest.
    """
    if value not in choices:
        hint = nearest(value, choices)
        listed = f"expected one of {', '.join(choices)}"
        raise RequestError(f"{flag}={short(value)}: {hint + '; ' if hint else ''}{listed}")
    return value


def check_no_key(argument: str) -> None:
    """Raises:
    RequestError: an argument looks like a service's key; names the field and does not repeat the value.
    """
    if KEYS.search(argument):
        field = argument.partition("=")[0] if "=" in argument else "an argument"
        field = field if not KEYS.search(field) else "an argument"
        raise RequestError(
            f"{short(field)}: looks like a secret, and other users see a command line; give --secret=NAME instead"
        )


def _matching(flag: str, value: str, pattern: re.Pattern[str], expected: str, suggestion: str) -> str:
    if pattern.fullmatch(value):
        return value
    hint = f"; did you mean {suggestion!r}?" if suggestion and pattern.fullmatch(suggestion) else ""
    raise RequestError(f"{flag}={short(value)}: expected {expected}{hint}")
