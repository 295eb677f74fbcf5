"""A stand-in for Google Cloud Storage on this machine: objects in memory behind the JSON API.

It serves what gcsfs and tensorstore use: whole and resumable uploads, media and metadata downloads, ranges, listings in
pages, deletion, and the preconditions on generations. Like the service it has no folders, no append and no lock; a
rename or a copy on the server is refused, so a test that passes has used none.

    with BucketServer("runs") as server:
        os.environ.update(server.environment())  # before gcsfs is imported; children inherit it
"""

from __future__ import annotations

import base64
import contextlib
import email.parser
import email.policy
import hashlib
import importlib
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit

from visor_jax.files import read_write

PAGE = 200  # entries of a listing's page at most; Google's is 1,000
_OBJECT = re.compile(r"(?:/download|/upload)?/storage/v1/b/(?P<bucket>[^/]+)(?:/o(?:/(?P<name>.+))?)?")


@dataclass(frozen=True)
class StoredObject:
    """One version of an object."""

    data: bytes
    generation: int
    written: float = field(default_factory=time.time)

    def describe(self, bucket: str, name: str) -> dict[str, Any]:
        """Returns the object's metadata as the JSON API does."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(self.written))
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{self.generation}",
            "name": name,
            "bucket": bucket,
            "generation": str(self.generation),
            "metageneration": "1",
            "contentType": "application/octet-stream",
            "size": str(len(self.data)),
            "md5Hash": base64.b64encode(hashlib.md5(self.data).digest()).decode(),
            "timeCreated": when,
            "updated": when,
        }


class Refusal(Exception):
    """A request that fails with an HTTP status."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class BucketServer:
    """Serves buckets on a free port of 127.0.0.1 inside a `with` block.

    Attributes:
      objects: (bucket, name) -> the newest version; a test may read and change it under `lock`.
      calls: (method, path with query) of every request, in order.
      refused: status and message of the answer to every request; None to serve them.
    """

    def __init__(self, *buckets: str) -> None:
        self.buckets, self.lock = set(buckets), threading.Lock()
        self.objects: dict[tuple[str, str], StoredObject] = {}
        self.calls: list[tuple[str, str]] = []
        self.refused: tuple[int, str] | None = None
        self._uploads: dict[str, tuple[str, str, dict[str, list[str]], bytearray]] = {}
        self._generation = 1_000
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.store = self  # type: ignore[attr-defined]

    @property
    def url(self) -> str:
        """Returns the server's address."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def environment(self) -> dict[str, str]:
        """Returns the variables that send gcsfs and tensorstore here instead of to Google."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # gcsfs would ask Google for the kind of the bucket
            "NO_GCE_CHECK": "true",
        }

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, name="bucket server", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        """Returns the names of a bucket's objects that begin with `prefix`, sorted."""
        with self.lock:
            return sorted(name for place, name in self.objects if place == bucket and name.startswith(prefix))

    def read(self, bucket: str, name: str) -> bytes:
        """Returns an object's bytes; KeyError if it does not exist."""
        with self.lock:
            return self.objects[bucket, name].data

    def write(self, bucket: str, name: str, data: bytes, query: dict[str, list[str]] | None = None) -> StoredObject:
        """Replaces an object, if the preconditions in the query hold."""
        with self.lock:
            self._check(bucket, name, query or {})
            self._generation += 1
            self.objects[bucket, name] = written = StoredObject(data, self._generation)
            return written

    def remove(self, bucket: str, name: str, query: dict[str, list[str]]) -> None:
        """Removes an object, if the preconditions in the query hold."""
        with self.lock:
            self._check(bucket, name, query)
            if self.objects.pop((bucket, name), None) is None:
                raise Refusal(404, f"No such object: {bucket}/{name}")

    def find(self, bucket: str, name: str, query: dict[str, list[str]]) -> StoredObject:
        """Returns an object, if the preconditions in the query hold."""
        with self.lock:
            self._check(bucket, name, query)
            if (bucket, name) not in self.objects:
                raise Refusal(404, f"No such object: {bucket}/{name}")
            return self.objects[bucket, name]

    def _check(self, bucket: str, name: str, query: dict[str, list[str]]) -> None:
        if bucket not in self.buckets:
            raise Refusal(404, f"The specified bucket does not exist: {bucket}")
        present = self.objects.get((bucket, name))
        generation = present.generation if present else 0
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"][0]) != generation:
            raise Refusal(412, "conditionNotMet")
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"][0]) == generation:
            raise Refusal(304, "not modified")

    def listing(self, bucket: str, query: dict[str, list[str]]) -> dict[str, Any]:
        """Returns one page of a listing: the objects, and the prefixes up to a delimiter."""
        first = {key: values[0] for key, values in query.items()}
        prefix, delimiter = first.get("prefix", ""), first.get("delimiter", "")
        with self.lock:
            self._check(bucket, "", {})
            present = {name: value for (place, name), value in sorted(self.objects.items()) if place == bucket}
        entries: dict[str, StoredObject | None] = {}  # None for a prefix
        for name, value in present.items():
            below = name >= first.get("startOffset", "") and ("endOffset" not in first or name < first["endOffset"])
            if not (name.startswith(prefix) and below):
                continue
            head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            entries[prefix + head + found if found else name] = None if found else value
        rest = [name for name in sorted(entries) if name > first.get("pageToken", "")]
        page = rest[: min(int(first.get("maxResults", PAGE)), PAGE)]
        answer: dict[str, Any] = {"kind": "storage#objects"}
        answer["items"] = [value.describe(bucket, name) for name in page if (value := entries[name]) is not None]
        answer["prefixes"] = [name for name in page if entries[name] is None]
        return answer | ({"nextPageToken": page[-1]} if len(rest) > len(page) else {})

    def begin_upload(self, bucket: str, name: str, query: dict[str, list[str]]) -> str:
        """Starts a resumable upload and returns its id."""
        with self.lock:
            self._check(bucket, name, query)
            number = f"upload{len(self._uploads)}"
            self._uploads[number] = (bucket, name, query, bytearray())
            return number

    def continue_upload(self, number: str, data: bytes, content_range: str) -> tuple[int, StoredObject | None]:
        """Adds to a resumable upload; returns (bytes so far, the object once it is complete)."""
        bucket, name, query, parts = self._uploads[number]
        match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", content_range) if content_range else None
        if match is not None and match[1] is not None:
            del parts[int(match[1]) :]
        parts.extend(data)
        if match is not None and (match[2] == "*" or len(parts) < int(match[2])):
            return len(parts), None
        return len(parts), self.write(bucket, name, bytes(parts), query)


@contextlib.contextmanager
def without_gcsfs() -> Iterator[None]:
    """Behaves inside the block as if gcsfs were not installed, also where it has been used before."""
    registry = importlib.import_module("fsspec.registry")._registry
    read_write._check_scheme.cache_clear()
    imported = sys.modules.get("gcsfs")
    sys.modules["gcsfs"] = None  # type: ignore[assignment]
    try:
        with mock.patch.dict(registry):
            registry.pop("gs", None)
            registry.pop("gcs", None)
            yield
    finally:
        # Not `mock.patch.dict`: it would also forget the modules that were first imported inside the block.
        del sys.modules["gcsfs"]
        if imported is not None:
            sys.modules["gcsfs"] = imported
        read_write._check_scheme.cache_clear()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints an error, unless the client was killed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet per answer

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing."""

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def do_PUT(self) -> None:
        self._handle()

    def do_DELETE(self) -> None:
        self._handle()

    def do_PATCH(self) -> None:
        self._handle()

    def _handle(self) -> None:
        store: BucketServer = self.server.store  # type: ignore[attr-defined]
        url = urlsplit(self.path)
        query, data = parse_qs(url.query, keep_blank_values=True), self._body()
        with store.lock:
            store.calls.append((self.command, unquote(self.path)))
        match = _OBJECT.fullmatch(url.path)
        try:
            if (refused := store.refused) is not None:
                raise Refusal(refused[0], refused[1])
            if match is None or re.search("/(rewriteTo|copyTo|moveTo|compose)(/|$)", match["name"] or ""):
                raise Refusal(400, f"{self.command} {url.path}: a bucket has no such operation here")
            bucket, name = unquote(match["bucket"]), unquote(match["name"] or query.get("name", [""])[0])
            if "upload" in url.path.split("/")[1]:
                self._upload(store, bucket, name, query, data)
            elif self.command == "DELETE" and name:
                store.remove(bucket, name, query)
                self._answer(204)
            elif self.command == "GET" and name:
                self._download(store, bucket, name, query, media=url.path.startswith("/download") or "alt" in query)
            elif self.command == "GET" and url.path.endswith("/o"):
                self._answer_json(store.listing(bucket, query))
            elif self.command == "GET" and bucket in store.buckets:
                self._answer_json({"kind": "storage#bucket", "id": bucket, "name": bucket, "location": "US"})
            else:
                raise Refusal(404 if self.command == "GET" else 400, f"{self.command} {url.path}")
        except Refusal as refusal:
            error = {"error": {"code": refusal.status, "message": str(refusal)}}
            self._answer(refusal.status, b"" if refusal.status == 304 else json.dumps(error).encode())

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _upload(self, store: BucketServer, bucket: str, name: str, query: dict[str, list[str]], data: bytes) -> None:
        if "upload_id" in query:
            if self.command == "DELETE":
                self._answer(499)
                return
            size, stored = store.continue_upload(query["upload_id"][0], data, self.headers.get("Content-Range", ""))
            if stored is None:
                self._answer(308, headers={"Range": f"bytes=0-{size - 1}"} if size else {})
                return
        elif query["uploadType"] == ["resumable"]:
            name = name or json.loads(data)["name"]
            number = store.begin_upload(bucket, name, query)
            self._answer(200, headers={"Location": f"{store.url}{self.path}&upload_id={number}"})
            return
        elif query["uploadType"] == ["multipart"]:
            meta, data = _two_parts(self.headers["Content-Type"], data)
            name = name or json.loads(meta)["name"]
            stored = store.write(bucket, name, data, query)
        else:
            stored = store.write(bucket, name, data, query)
        self._answer_json(stored.describe(bucket, name))

    def _download(
        self, store: BucketServer, bucket: str, name: str, query: dict[str, list[str]], *, media: bool
    ) -> None:
        stored = store.find(bucket, name, query)
        if not media:
            self._answer_json(stored.describe(bucket, name))
            return
        headers = {"x-goog-generation": str(stored.generation), "x-goog-stored-content-length": str(len(stored.data))}
        wanted = re.fullmatch(r"bytes=(?:(\d+)-(\d*)|-(\d+))", self.headers.get("Range", ""))
        if wanted is None:
            self._answer(200, stored.data, headers)
            return
        size = len(stored.data)
        start = max(size - int(wanted[3]), 0) if wanted[3] else int(wanted[1])
        end = min(int(wanted[2]) + 1, size) if wanted[2] else size
        if start >= size:
            self._answer(416, b"", {"Content-Range": f"bytes */{size}"})
            return
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        self._answer(206, stored.data[start:end], headers)

    def _answer_json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, data: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": "application/octet-stream", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the client was killed
            self.wfile.write(data)


def _two_parts(content_type: str, data: bytes) -> tuple[bytes, bytes]:
    """Splits the body of a multipart upload into the metadata and the object's bytes."""
    message = email.parser.HeaderParser(policy=email.policy.HTTP).parsestr(f"Content-Type: {content_type}\n\n")
    boundary = b"--" + str(message.get_boundary()).encode()
    parts = list(_split(data, boundary))
    return tuple(re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in parts)[:2]  # type: ignore[return-value]


def _split(data: bytes, boundary: bytes) -> Iterator[bytes]:
    """Yields the parts between boundaries, each without its last line break."""
    place = data.index(boundary)
    while (end := data.find(b"\n" + boundary, place + len(boundary))) >= 0:
        yield data[place + len(boundary) : end].removesuffix(b"\r")
        place = end + 1
