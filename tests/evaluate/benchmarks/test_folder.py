"""Reading of benchmarks from folders in the hub's layout, and the errors of those that do not fit."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.evaluate.benchmarks import hub_rows, hub_tables
from visor_jax.data.sample import SkipSample
from visor_jax.errors import RequestError
from visor_jax.evaluate.benchmarks import MODULES, named_benchmark
from visor_jax.evaluate.benchmarks.base import Item
from visor_jax.evaluate.benchmarks.folder import Table

TEXT, PICTURE = hub_tables.TEXT, hub_tables.PICTURE


def table_of(name: str, data: Path) -> Table:
    return Table(named_benchmark(name), str(data))


def repo_of(name: str) -> str:
    return named_benchmark(name).repo.rpartition("/")[2]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_layout_is_read(name: str, tmp_path: Path) -> None:
    """From the repository's folder, or from one that holds it; questions in order, each with its pictures."""
    rows = hub_tables.rows_of(name, 5)
    hub_tables.write(name, tmp_path / repo_of(name), rows)
    for data in (tmp_path, tmp_path / repo_of(name)):
        table, benchmark = table_of(name, data), named_benchmark(name)
        assert table.items == [benchmark.item(row) for row in rows]
        for number in range(len(table)):
            pictures = table.pictures(number)
            assert pictures and all(picture.dtype == np.uint8 and picture.shape[2] == 3 for picture in pictures)
    pictures = {"mmmu": [2, 1, 2, 1, 2], "seedbench": [1, 1, 3, 1, 1]}.get(name, [1] * 5)
    assert [len(table_of(name, tmp_path).pictures(number)) for number in range(5)] == pictures


def test_shards_are_read_in_order_and_all_of_them(tmp_path: Path) -> None:
    paths = hub_tables.write("chartqa", tmp_path, hub_tables.rows_of("chartqa", 7), shards=3)
    table = table_of("chartqa", tmp_path)
    assert [item.reference for item in table.items] == [str(10 * number) for number in range(7)]
    assert table.place(6) == f"{paths[2]}, row 0"
    hashed = [path.rename(path.with_name(f"{path.stem}-{number:016x}.parquet")) for number, path in enumerate(paths)]
    assert table_of("chartqa", tmp_path).items == table.items, "as older releases of datasets name them"
    for path, name in zip(hashed, paths, strict=True):
        path.rename(name)
    paths[1].unlink()
    with pytest.raises(RequestError, match=r"test-00001-of-00003.parquet: no such file; expected all 3 files"):
        table_of("chartqa", tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "test-00000-of-00001.parquet",
        "test-00002-of-00002.parquet",
        "test-00000-of-00002-0123456789abcdef.parquet",
        "test-00000-of-00002 (1).parquet",
        "test-old-00000-of-00001.parquet",
    ],
)
def test_a_second_table_in_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    """The questions would count twice."""
    paths = hub_tables.write("chartqa", tmp_path, hub_tables.rows_of("chartqa", 4), shards=2)
    (paths[0].with_name(name)).write_bytes(paths[0].read_bytes())
    with pytest.raises(RequestError) as caught:
        table_of("chartqa", tmp_path)
    message = str(caught.value)
    assert message.startswith(f"--data: {paths[0].parent}: has ") and name in message and paths[0].name in message
    assert message.endswith("; expected the files of one table: move away those of the other")


def test_tables_with_names_of_their_own_are_read_together(tmp_path: Path) -> None:
    """A pattern of a user's benchmark may match several."""
    rows, columns = hub_tables.rows_of("chartqa", 4), hub_tables.TABLES["chartqa"].columns
    for number, name in enumerate(("art-00000-of-00002", "art-00001-of-00002", "biology-00000-of-00001", "more")):
        hub_tables.write_table(tmp_path / "data" / f"{name}.parquet", [rows[number]], columns)
    benchmark = dataclasses.replace(named_benchmark("chartqa"), files=("data/*.parquet",))
    assert [item.reference for item in Table(benchmark, str(tmp_path)).items] == ["0", "10", "20", "30"]


def test_mmmu_in_a_folder_for_each_subject(tmp_path: Path) -> None:
    rows, columns = hub_tables.rows_of("mmmu", 2), hub_tables.TABLES["mmmu"].columns
    for subject, row in zip(("Accounting", "Pharmacy"), rows, strict=True):
        hub_tables.write_table(tmp_path / subject / "validation-00000-of-00001.parquet", [row], columns)
    assert [item.facts["subject"] for item in table_of("mmmu", tmp_path).items] == [
        "Accounting",
        "Diagnostics_and_Laboratory_Medicine",
    ]


def test_a_question_of_gqa_takes_the_picture_that_it_names(tmp_path: Path) -> None:
    hub_tables.write("gqa", tmp_path, hub_tables.rows_of("gqa", 3))
    first, second, third = (table_of("gqa", tmp_path).pictures(number)[0] for number in range(3))
    np.testing.assert_array_equal(first, third)
    assert (first != second).any()


@pytest.mark.parametrize(
    ("kind", "convert"),
    [
        (pa.large_binary(), lambda picture: picture["bytes"]),
        (TEXT, lambda picture: base64.b64encode(picture["bytes"]).decode()),
        (pa.large_string(), lambda picture: base64.b64encode(picture["bytes"]).decode()),
    ],
)
def test_pictures_are_structs_bytes_or_base64(kind: Any, convert: Callable[[Any], Any], tmp_path: Path) -> None:
    rows, columns = hub_tables.rows_of("chartqa", 2), dict(hub_tables.TABLES["chartqa"].columns)
    hub_tables.write("chartqa", tmp_path / "struct", rows)
    changed = [{**row, "image": convert(row["image"])} for row in rows]
    hub_tables.write_table(tmp_path / "other" / "data" / "test-0.parquet", changed, {**columns, "image": kind})
    for number in range(2):
        (struct,), (other,) = (
            table_of("chartqa", tmp_path / folder).pictures(number) for folder in ("struct", "other")
        )
        np.testing.assert_array_equal(struct, other)


@pytest.mark.parametrize(
    ("picture", "reason", "message"),
    [
        (None, "missing_file", "image has no bytes"),
        ({"bytes": None, "path": "a.png"}, "missing_file", "inside the table"),
        ({"bytes": b"", "path": None}, "missing_file", "image has no bytes"),
        ({"bytes": b"text", "path": None}, "image_format", "'image' is not a JPEG"),
    ],
)
def test_a_picture_that_cannot_be_read_has_a_reason(picture: Any, reason: str, message: str, tmp_path: Path) -> None:
    rows = hub_tables.rows_of("chartqa", 2)
    hub_tables.write("chartqa", tmp_path, [rows[0], {**rows[1], "image": picture}])
    table = table_of("chartqa", tmp_path)
    assert table.pictures(0)
    with pytest.raises(SkipSample, match=message) as caught:
        table.pictures(1)
    assert caught.value.reason == reason


def test_an_empty_list_of_pictures_is_a_missing_picture(tmp_path: Path) -> None:
    first, second = hub_tables.rows_of("seedbench", 2)
    hub_tables.write("seedbench", tmp_path, [{**first, "image": []}, {**second, "image": None}])
    table = table_of("seedbench", tmp_path)
    for number, message in enumerate(("image is an empty list", "image has no bytes")):
        with pytest.raises(SkipSample, match=message) as caught:
            table.pictures(number)
        assert caught.value.reason == "missing_file"


def test_text_that_is_not_base64_is_no_picture(tmp_path: Path) -> None:
    rows, columns = hub_tables.rows_of("chartqa", 1), dict(hub_tables.TABLES["chartqa"].columns)
    hub_tables.write_table(
        tmp_path / "data" / "test-0.parquet", [{**rows[0], "image": "a.png"}], {**columns, "image": TEXT}
    )
    with pytest.raises(SkipSample, match="image is not base64"):
        table_of("chartqa", tmp_path).pictures(0)


# --- what does not fit ------------------------------------------------------------------------------------------------


def test_a_folder_without_the_files_names_what_is_expected(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(RequestError, match=r"has no data/test-\*.parquet, nor has ChartQA/ in it; expected the files"):
        table_of("chartqa", tmp_path)
    with pytest.raises(RequestError, match="is not a folder; expected one with the files of lmms-lab-encoder/ChartQA"):
        table_of("chartqa", tmp_path / "none")
    hub_tables.write("gqa", tmp_path, hub_tables.rows_of("gqa", 1))
    (tmp_path / "testdev_balanced_images" / "testdev-00000-of-00001.parquet").unlink()
    with pytest.raises(RequestError, match="has no testdev_balanced_images"):
        table_of("gqa", tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "docvqa",
            {"answers": None},
            "has the columns 'questionId', .*; expected also 'answers', a list of texts, as in",
        ),
        ("docvqa", {"answers": TEXT}, "column 'answers' of type string; expected a list of texts"),
        ("docvqa", {"image": pa.int64()}, "column 'image' of type int64; expected pictures"),
        ("seedbench", {"image": PICTURE}, "column 'image' of type struct<.*>; expected lists of pictures"),
        ("mmbench", {"index": pa.float64()}, "column 'index' of type double; expected whole numbers"),
        ("gqa", {"imageId": None}, "expected also 'imageId', text"),
    ],
)
def test_columns_that_do_not_fit_are_named(name: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    columns = {**hub_tables.TABLES[name].columns, **change}
    columns = {column: kind for column, kind in columns.items() if kind is not None}
    (path,) = hub_tables.write(name, tmp_path, hub_tables.rows_of(name, 1))
    hub_tables.write_table(path, [], columns)
    with pytest.raises(RequestError, match=message) as caught:
        table_of(name, tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("docvqa", {"question": None}, "row 2: question is null; expected text"),
        ("ai2d", {"answer": "4"}, "row 2: answer '4' of 4 options; expected the number of one, from 0"),
        ("ai2d", {"answer": "B"}, "row 2: invalid literal"),
        ("scienceqa", {"answer": -1}, "answer -1 of 2 options"),
        ("chartqa", {"type": "val"}, "type 'val'; expected human_test or augmented_test"),
        ("mme", {"answer": "maybe"}, "answer 'maybe'; expected Yes or No"),
        ("mme", {"category": "taste"}, "category 'taste'; expected one of existence"),
        ("pope", {"answer": "true"}, "answer 'true'; expected yes or no"),
        ("mmbench", {"answer": "D"}, "answer 'D'; expected one of A, B"),
        ("mmmu", {"options": "A, B"}, "'A, B'; expected a list of texts"),
        ("mmmu", {"question_type": "essay"}, "question_type 'essay'; expected multiple-choice or open"),
        ("mmmu", {"question": "<image 9>"}, "mentions <image 9>; expected at most 7"),
        ("vstar", {"label": "E"}, "label 'E'; expected one of A, B, C, D"),
        ("vstar", {"text": "Which side?\n(A) left\n(B) right", "label": "C"}, "label 'C'; expected one of A, B$"),
        ("gqa", {"imageId": "n7"}, "imageId='n7': no row of testdev_balanced_images/.* has this id"),
        # No reference, or one that no answer or any answer equals.
        (
            "docvqa",
            {"answers": []},
            r"row 2: the right answer is \[\]; expected a text that is not empty, or a list of",
        ),
        ("docvqa", {"answers": ["2", None]}, r"row 2: answers\[1\] is null; expected a list of texts"),
        ("infovqa", {"answers": ["", " \n"]}, "the right answer is "),
        ("textvqa", {"answers": []}, r"the right answer is \[\]"),
        ("textvqa", {"answers": [None] * 10}, r"answers\[0\] is null"),
        ("textvqa", {"answers": [""] * 10}, "the right answer is "),
        ("ocrbench", {"answer": []}, r"the right answer is \[\]"),
        ("ocrbench", {"answer": [None]}, r"answer\[0\] is null"),
        ("ocrbench", {"answer": ["CENTRE", " "]}, r"answer\[1\] is ' ', which any answer holds; expected a text"),
        ("ai2d", {"options": ["larva", None, "egg", "adult"]}, r"options\[1\] is null; expected a list of texts"),
        ("scienceqa", {"choices": [None, "soft"]}, r"choices\[0\] is null"),
        ("chartqa", {"answer": ""}, "the right answer is ''; expected a text that is not empty"),
        ("gqa", {"answer": " "}, "the right answer is ' '"),
        ("realworldqa", {"answer": " "}, "the right answer is ''"),
        ("mmmu", {"question_type": "open", "answer": ""}, "the right answer is ''"),
        ("mmmu", {"question_type": "open", "answer": "[]"}, r"the right answer is \[\]"),
        ("mmmu", {"question_type": "open", "answer": "['5', '']"}, r"answer\[1\] is '', which any answer holds"),
        ("mmmu", {"answer": "D"}, "answer 'D'; expected one of A, B, C"),
        ("mmmu", {"options": "[]"}, r"options \[\] of a multiple-choice question; expected at least one"),
        ("mmstar", {"answer": ""}, "answer ''; expected one of A, B, C, D"),
        ("mmstar", {"answer": "E"}, "answer 'E'; expected one of A, B, C, D"),
        ("seedbench", {"answer": ""}, "answer ''; expected one of A, B, C, D"),
        ("seedbench", {"answer": "a dog"}, "answer 'a dog'; expected one of A, B, C, D"),
    ],
)
def test_a_malformed_row_is_refused_before_anything_is_answered(
    name: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    rows = hub_tables.rows_of(name, 3)
    (path,) = hub_tables.write(name, tmp_path, [*rows[:2], {**rows[2], **change}])
    with pytest.raises(RequestError, match=message) as caught:
        table_of(name, tmp_path)
    assert f"{path}, row 2: " in str(caught.value)


def test_an_empty_reference_may_stand_beside_others(tmp_path: Path) -> None:
    """As among the ten people of TextVQA."""
    first, second = hub_tables.rows_of("textvqa", 2)
    hub_tables.write("textvqa", tmp_path, [first, {**second, "answers": [""] * 3 + ["dakota"] * 7}])
    assert len(table_of("textvqa", tmp_path)) == 2


@pytest.mark.parametrize("reference", [5, [5], None, ["yes", None], ["", ""]])
def test_a_users_reference_that_is_no_text_is_refused(reference: Any, tmp_path: Path) -> None:
    (path,) = hub_tables.write("chartqa", tmp_path, hub_tables.rows_of("chartqa", 1))
    benchmark = dataclasses.replace(
        named_benchmark("chartqa"), item=lambda row: Item("", row["question"], ["image"], reference)
    )
    with pytest.raises(RequestError) as caught:
        Table(benchmark, str(tmp_path))
    assert f"{path}, row 0: the right answer is {reference!r}; expected a text" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "column", "value", "allowed"),
    [
        ("docvqa", "questionId", "49153", 1),
        ("infovqa", "questionId", "98313", 1),
        ("textvqa", "question_id", 34602, 1),
        ("gqa", "id", "201300000", 1),
        ("mmbench", "index", 241, 1),
        ("mmmu", "id", "validation_Accounting_0", 1),
        ("mme", "question_id", "existence/0000.jpg", 2),
    ],
)
def test_questions_that_are_there_twice_are_refused(
    name: str, column: str, value: str | int, allowed: int, tmp_path: Path
) -> None:
    """Where the published table has each id once, of MME two questions of each picture."""
    rows = hub_tables.rows_of(name, 4)
    assert rows[0][column] == value
    first, second = hub_tables.write(name, tmp_path, [*rows, rows[0], rows[3]], shards=2)
    with pytest.raises(RequestError) as caught:
        table_of(name, tmp_path)
    assert str(caught.value) == (
        f"--data: {second}, row 1: the id '{value}' is also that of {first}, row 0; expected at most {allowed}"
        f" row{'s' if allowed == 2 else ''} with one id: remove what is there twice"
    )


@pytest.mark.parametrize("name", ["chartqa", "pope", "mmstar"])
def test_questions_without_an_id_may_be_equal(name: str, tmp_path: Path) -> None:
    hub_tables.write(name, tmp_path, hub_tables.rows_of(name, 2) * 2)
    assert len(table_of(name, tmp_path)) == 4


@pytest.mark.parametrize(
    ("key", "message"),
    [("n0", "id='n0' is also that of {path}, row 0; expected one picture for each"), (None, "id is null; expected")],
)
def test_pictures_of_gqa_have_a_key_each(key: str | None, message: str, tmp_path: Path) -> None:
    """Or the last picture would be taken for a question."""
    hub_tables.write("gqa", tmp_path, hub_tables.rows_of("gqa", 3))
    path = tmp_path / "testdev_balanced_images" / "testdev-00000-of-00001.parquet"
    pictures = [hub_rows.gqa_picture(number) for number in range(3)]
    hub_tables.write_table(path, [*pictures[:2], {**pictures[2], "id": key}], {"id": TEXT, "image": PICTURE})
    with pytest.raises(RequestError) as caught:
        table_of("gqa", tmp_path)
    assert f"--data: {path}, row 2: {message.format(path=path)}" in str(caught.value)


def test_an_empty_table_and_a_damaged_file_are_refused(tmp_path: Path) -> None:
    (path,) = hub_tables.write("chartqa", tmp_path, [])
    with pytest.raises(RequestError, match="the files of chartqa have no row"):
        table_of("chartqa", tmp_path)
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(RequestError, match=f"--data: cannot read {path} as Parquet"):
        table_of("chartqa", tmp_path)


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    rows = hub_tables.rows_of("chartqa", 3)
    hub_tables.write("chartqa", tmp_path, rows)
    before = table_of("chartqa", tmp_path).fingerprint()
    assert table_of("chartqa", tmp_path).fingerprint() == before and set(before) == {"data/test-00000-of-00001.parquet"}
    hub_tables.write("chartqa", tmp_path, [*rows[:2], {**rows[2], "answer": "21"}])
    assert table_of("chartqa", tmp_path).fingerprint() != before
