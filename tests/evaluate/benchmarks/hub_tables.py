"""Tiny tables of every benchmark with the columns of the hub, written when a test asks for them.

`write(name, folder, rows)` writes the files of one benchmark into a repository's folder, as `datasets` writes them;
the rows are those of `hub_rows.py` (`rows_of`), changed as a test needs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.evaluate.benchmarks import hub_rows
from tests.evaluate.benchmarks.hub_rows import Row

PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
PICTURES = pa.list_(PICTURE)
TEXT, TEXTS, WHOLE, SMALL = pa.string(), pa.list_(pa.string()), pa.int64(), pa.int8()


@dataclass(frozen=True)
class HubTable:
    """The table of a benchmark: its file's place without the number of the shard, its columns, and its rows.

    `place` is a file's name if the hub has a single file.
    """

    place: str
    columns: Mapping[str, pa.DataType]
    row: Callable[[int], Row]


AI2D_COLUMNS = {"question": TEXT, "options": TEXTS, "answer": TEXT, "image": PICTURE}
META = pa.struct([("source", TEXT), ("split", TEXT), ("image_path", TEXT)])
GQA_TYPES = pa.struct([("structural", TEXT), ("semantic", TEXT), ("detailed", TEXT)])
TABLES: dict[str, HubTable] = {
    "docvqa": HubTable(
        "DocVQA/validation",
        {
            "questionId": TEXT,
            "question": TEXT,
            "question_types": TEXTS,
            "image": PICTURE,
            "docId": WHOLE,
            "ucsf_document_id": TEXT,
            "ucsf_document_page_no": TEXT,
            "answers": TEXTS,
            "data_split": TEXT,
        },
        hub_rows.docvqa,
    ),
    "infovqa": HubTable(
        "InfographicVQA/validation",
        {
            "questionId": TEXT,
            "question": TEXT,
            "answers": TEXTS,
            "answer_type": TEXTS,
            "image": PICTURE,
            "image_url": TEXT,
            "operation/reasoning": TEXTS,
            "ocr": TEXT,
            "data_split": TEXT,
        },
        hub_rows.infovqa,
    ),
    "chartqa": HubTable(
        "data/test", {"type": TEXT, "question": TEXT, "answer": TEXT, "image": PICTURE}, hub_rows.chartqa
    ),
    "textvqa": HubTable(
        "data/validation",
        {
            "image_id": TEXT,
            "question_id": pa.int32(),
            "question": TEXT,
            "question_tokens": TEXTS,
            "image": PICTURE,
            "image_width": pa.int32(),
            "image_height": pa.int32(),
            "flickr_original_url": TEXT,
            "flickr_300k_url": TEXT,
            "answers": TEXTS,
            "image_classes": TEXTS,
            "set_name": TEXT,
            "ocr_tokens": TEXTS,
        },
        hub_rows.textvqa,
    ),
    "ocrbench": HubTable(
        "data/test",
        {"dataset": TEXT, "question": TEXT, "question_type": TEXT, "answer": TEXTS, "image": PICTURE},
        hub_rows.ocrbench,
    ),
    "ai2d": HubTable("data/test", AI2D_COLUMNS, hub_rows.ai2d),
    "ai2d_no_mask": HubTable("data/test", AI2D_COLUMNS, hub_rows.ai2d),
    "vstar": HubTable(
        "data/test",
        {"image": PICTURE, "text": TEXT, "category": TEXT, "label": TEXT, "question_id": TEXT},
        hub_rows.vstar,
    ),
    "mme": HubTable(
        "data/test",
        {"question_id": TEXT, "image": PICTURE, "question": TEXT, "answer": TEXT, "category": TEXT},
        hub_rows.mme,
    ),
    "mmstar": HubTable(
        "mmstar.parquet",
        {
            "index": WHOLE,
            "question": TEXT,
            "image": pa.binary(),
            "answer": TEXT,
            "category": TEXT,
            "l2_category": TEXT,
            "meta_info": META,
        },
        hub_rows.mmstar,
    ),
    "pope": HubTable(
        "data/test",
        {
            "id": TEXT,
            "question_id": TEXT,
            "question": TEXT,
            "answer": TEXT,
            "image_source": TEXT,
            "image": PICTURE,
            "category": TEXT,
        },
        hub_rows.pope,
    ),
    "gqa": HubTable(
        "testdev_balanced_instructions/testdev",
        {
            "id": TEXT,
            "imageId": TEXT,
            "question": TEXT,
            "answer": TEXT,
            "fullAnswer": TEXT,
            "isBalanced": pa.bool_(),
            "types": GQA_TYPES,
        },
        hub_rows.gqa,
    ),
    "scienceqa": HubTable(
        "ScienceQA-IMG/test",
        {
            "image": PICTURE,
            "question": TEXT,
            "choices": TEXTS,
            "answer": SMALL,
            "hint": TEXT,
            "task": TEXT,
            "grade": TEXT,
            "subject": TEXT,
            "topic": TEXT,
            "category": TEXT,
            "skill": TEXT,
            "lecture": TEXT,
            "solution": TEXT,
        },
        hub_rows.scienceqa,
    ),
    "realworldqa": HubTable(
        "data/test", {"image": PICTURE, "image_path": TEXT, "question": TEXT, "answer": TEXT}, hub_rows.realworldqa
    ),
    "mmbench": HubTable(
        "en/dev",
        {
            "index": WHOLE,
            "question": TEXT,
            "hint": TEXT,
            "answer": TEXT,
            "A": TEXT,
            "B": TEXT,
            "C": TEXT,
            "D": TEXT,
            "category": TEXT,
            "image": PICTURE,
            "source": TEXT,
            "L2-category": TEXT,
            "comment": TEXT,
            "split": TEXT,
        },
        hub_rows.mmbench,
    ),
    "mmmu": HubTable(
        "data/validation",
        {
            "id": TEXT,
            "question": TEXT,
            "options": TEXT,
            "explanation": TEXT,
            **{f"image_{index}": PICTURE for index in range(1, 8)},
            "img_type": TEXT,
            "answer": TEXT,
            "topic_difficulty": TEXT,
            "question_type": TEXT,
            "subfield": TEXT,
        },
        hub_rows.mmmu,
    ),
    "seedbench": HubTable(
        "data/test",
        {
            "answer": TEXT,
            "choice_a": TEXT,
            "choice_b": TEXT,
            "choice_c": TEXT,
            "choice_d": TEXT,
            "data_id": TEXT,
            "data_type": TEXT,
            "question": TEXT,
            "question_id": TEXT,
            "question_type_id": pa.int16(),
            "image": PICTURES,
            "segment": pa.list_(WHOLE),
        },
        hub_rows.seedbench,
    ),
}


def rows_of(name: str, count: int) -> list[Row]:
    """Returns the first rows of a benchmark's table."""
    return [TABLES[name].row(number) for number in range(count)]


def feature(kind: pa.DataType) -> dict[str, Any]:
    """Returns the description by which `datasets` knows pictures from structs."""
    if kind == PICTURE:
        return {"_type": "Image"}
    if pa.types.is_list(kind):
        return {"feature": feature(kind.value_type), "_type": "List"}
    if pa.types.is_struct(kind):
        return {field.name: feature(field.type) for field in kind}
    return {"dtype": str(kind), "_type": "Value"}


def write_table(path: Path, rows: Sequence[Row], columns: Mapping[str, pa.DataType]) -> None:
    """Writes one file, with two rows in a row group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    described = json.dumps({"info": {"features": {name: feature(kind) for name, kind in columns.items()}}})
    schema = pa.schema(list(columns.items()), metadata={"huggingface": described})
    pq.write_table(pa.Table.from_pylist(list(rows), schema), path, row_group_size=2)


def write(name: str, folder: Path, rows: Sequence[Row], shards: int = 1) -> list[Path]:
    """Writes the table of a benchmark into a repository's folder, of GQA also its pictures; returns its files."""
    table = TABLES[name]
    if name == "gqa":
        pictures = folder / "testdev_balanced_images" / "testdev-00000-of-00001.parquet"
        write_table(pictures, [hub_rows.gqa_picture(number) for number in range(2)], {"id": TEXT, "image": PICTURE})
    if table.place.endswith(".parquet"):
        write_table(folder / table.place, rows, table.columns)
        return [folder / table.place]
    paths = [folder / f"{table.place}-{number:05d}-of-{shards:05d}.parquet" for number in range(shards)]
    size = -(-len(rows) // shards)
    for number, path in enumerate(paths):
        write_table(path, rows[number * size : (number + 1) * size], table.columns)
    return paths
