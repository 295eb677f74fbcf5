"""Files in a bucket, through gcsfs and tensorstore, against a stand-in of Google Cloud Storage."""

from __future__ import annotations

import errno
import importlib.util
import os
import socket
import tempfile

import pytest
from etils.epath import gpath

from visor_jax.errors import RequestError, RunError, unwritable
from visor_jax.files import bucket as bucket_module
from visor_jax.files import read_write
from visor_jax.files.bucket import (
    UNFINISHED,
    SharedObject,
    bucket_errors,
    names_below,
    size_of,
    uploaded_folder,
)
from visor_jax.files.growing import open_growing
from visor_jax.files.read_write import as_path, read_json, read_regular, remove_folder, write_bytes, write_json
from visor_jax.testing.bucket import Refusal, without_gcsfs


def test_whole_objects(bucket):
    place = bucket / "a" / "b.json"
    write_json(place, {"x": [1, None]})
    assert read_json(place) == {"x": [1, None]}
    data = b"\r\n\r\n--==0==" * 2_000_000  # in parts of some megabytes
    write_bytes(bucket / "c", data)
    assert read_regular(bucket / "c", 2**25) == data and size_of(bucket / "c") == len(data)
    assert names_below(bucket) == ["a/b.json", "c"]
    with pytest.raises(OSError, match="too large"):
        read_regular(bucket / "c", 10)
    with pytest.raises(RequestError, match="no such file"):
        read_json(bucket / "missing.json")
    remove_folder(bucket)
    remove_folder(bucket)
    assert names_below(bucket) == []


def test_what_another_process_wrote_is_seen_at_once(bucket, bucket_server):
    write_bytes(bucket / "a", b"1")
    assert [path.name for path in bucket.iterdir()] == ["a"]
    bucket_server.write("runs", f"{bucket.name}/b", b"2")
    assert [path.name for path in bucket.iterdir()] == ["a", "b"] and (bucket / "b").exists()
    bucket_server.remove("runs", f"{bucket.name}/a", {})
    assert names_below(bucket) == ["b"] and not (bucket / "a").exists()


def test_listings_come_in_pages(bucket, bucket_server):
    names = [f"{number:03}" for number in range(250)]
    for name in names:
        bucket_server.write("runs", f"{bucket.name}/{name}", b"")
    assert names_below(bucket) == names and len(list(bucket.iterdir())) == 250


@pytest.mark.parametrize(
    "answer, number, kind",
    [
        ((401, "Anonymous caller does not have storage.objects.create access"), errno.EACCES, RequestError),
        ((403, "denied"), errno.EACCES, RequestError),
        ((404, "The specified bucket does not exist"), errno.ENOENT, RequestError),
        ((400, "strange"), errno.EIO, RunError),
    ],
)
def test_errors_name_the_object(bucket, bucket_server, answer, number, kind):
    bucket_server.refused = answer
    shared = SharedObject(bucket / "lock")
    for action in (lambda: write_bytes(bucket / "a", b""), shared.read, lambda: shared.write(b"", b"")):
        if action == shared.read and number == errno.ENOENT:
            continue  # no such object: an answer
        with pytest.raises(OSError) as error:
            action()
        assert error.value.errno == number and str(error.value.filename).startswith(str(bucket))
        assert type(unwritable("x", error.value)) is kind


def test_a_service_that_stays_busy_is_an_error_after_some_seconds(bucket, bucket_server, monkeypatch):
    monkeypatch.setitem(bucket_module._RETRIES, "initial_delay", "10ms")
    bucket_server.refused = (503, "busy")
    before = len(bucket_server.calls)
    with pytest.raises(OSError, match="4 retry attempts failed: busy") as error:
        SharedObject(bucket / "lock").read()
    assert error.value.errno == errno.EIO and len(bucket_server.calls) == before + 5


def test_the_stand_in_renames_and_copies_nothing(bucket):
    write_bytes(bucket / "a", b"1")
    with pytest.raises(OSError, match="no such operation"), bucket_errors(bucket):
        (bucket / "a").rename(bucket / "b")
    assert names_below(bucket) == ["a"]


def test_other_errors_stay():
    with pytest.raises(KeyError), bucket_errors("gs://a/b"):
        raise KeyError


def test_an_object_is_replaced_only_if_it_has_not_changed(bucket):
    mine, theirs = SharedObject(bucket / "x"), SharedObject(bucket / "x")
    content, absent = mine.read()
    assert content is None
    assert mine.write(b"1", absent) and not theirs.write(b"2", absent)
    content, first = theirs.read()
    assert content == b"1" and theirs.write(b"2", first) and not mine.write(b"3", first)
    assert not mine.write(None, first) and mine.read()[0] == b"2"
    assert mine.write(None, mine.read()[1]) and mine.read()[0] is None


@pytest.mark.parametrize("scheme", ["s3", "az"])
def test_other_buckets_hold_no_lock(scheme):
    with pytest.raises(RequestError, match=rf"a run's folder cannot be in {scheme}://; expected gs://"):
        SharedObject(as_local(f"{scheme}://b/lock.json"))


def as_local(text: str):
    from etils import epath

    return epath.Path(text)


def test_a_growing_object_is_replaced_by_flush(bucket):
    file = open_growing(bucket / "log")
    file.write(b"a\n")
    assert (bucket / "log").read_bytes() == b""
    file.flush()
    file.write(b"b\n")
    assert (bucket / "log").read_bytes() == b"a\n"
    file.close()
    again = open_growing(bucket / "log")
    again.write(b"c\n")
    again.close()
    assert (bucket / "log").read_bytes() == b"a\nb\nc\n"


# --- a folder that is uploaded ----------------------------------------------------------------------------------------


def test_the_last_file_completes_an_uploaded_folder(bucket, bucket_server):
    for number in (1, 2):
        with uploaded_folder(bucket, "done") as folder:
            (folder / "done").write_text(f"d{number}")
            (folder / "deep").mkdir()
            (folder / "deep" / f"z{number}").write_text("z")
        assert names_below(bucket) == [f"deep/z{number}", "done"] and (bucket / "done").read_text() == f"d{number}"
        newest = max(bucket_server.objects, key=lambda name: bucket_server.objects[name].generation)
        assert newest == ("runs", f"{bucket.name}/done")


def test_a_killed_upload_leaves_no_temporary_folder_for_long(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / f".visor_upload.{2**22 + 1}@{socket.gethostname()}.partial").mkdir()
    with uploaded_folder(bucket, "done") as folder:
        (folder / "done").write_text("d")
        assert list(tmp_path.iterdir()) == [folder] and folder.stat().st_mode & 0o777 == 0o700
    assert not any(tmp_path.iterdir()) and names_below(bucket) == ["done"]


@pytest.mark.parametrize("uploaded", [0, 1, 2])
def test_an_interrupted_upload_is_not_complete(bucket, bucket_server, monkeypatch, uploaded):
    with uploaded_folder(bucket, "done") as folder:
        (folder / "done").write_text("old")
    real, writes = bucket_server.write, []

    def write(*arguments):
        writes.append(arguments)
        if len(writes) > 1 + uploaded:
            raise Refusal(400, "interrupted")
        return real(*arguments)

    monkeypatch.setattr(bucket_server, "write", write)
    with pytest.raises(OSError, match="interrupted"), uploaded_folder(bucket, "done") as folder:
        for name in ("a", "b", "done"):
            (folder / name).write_text("new")
    assert names_below(bucket) == sorted([UNFINISHED, *"ab"[:uploaded]])


@pytest.mark.usefixtures("bucket")
def test_tensorflow_is_not_used_where_it_is_installed(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find_spec("json" if name == "tensorflow" else name))
    monkeypatch.delenv("EPATH_USE_TF")
    gpath._is_tf_installed.cache_clear()
    assert gpath._is_tf_installed()
    read_write.check_scheme("gs")
    assert not gpath._is_tf_installed() and os.environ["EPATH_USE_TF"] == "false"


# --- without the extra ------------------------------------------------------------------------------------------------


def test_without_gcsfs_the_extra_is_named():
    with without_gcsfs(), pytest.raises(RequestError, match=r"gs://: needs the package gcsfs.*'visor-jax\[gcs\]'"):
        as_path("gs://bucket/run")
    with pytest.raises(RequestError, match="ftp://: unknown kind of bucket"):
        as_path("ftp://bucket/run")
