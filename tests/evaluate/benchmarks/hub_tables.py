"""Tiny tables of every benchmark with the columns of the hub, drawn and written when a test asks for them.

`write(name, folder, rows)` writes the files of one benchmark into a repository's folder, as `datasets` writes them.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TEXT, TEXTS = pa.string(), pa.list_(pa.string())


def drawn(text: str, size: tuple[int, int] = (64, 48)) -> dict[str, Any]:
    """Returns a picture of a text, as the hub stores it."""
    image = Image.new("RGB", size, tuple(np.random.default_rng(len(text)).integers(120, 256, 3).tolist()))
    ImageDraw.Draw(image).text((4, 10), text, fill="black")
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def docvqa(number: int) -> dict[str, Any]:
    return {
        "questionId": str(49153 + number),
        "question": f"What is the number on page {number}?",
        "question_types": ["handwritten"],
        "image": drawn(f"No. {number}"),
        "docId": 14465 + number,
        "ucsf_document_id": "pybv0228",
        "ucsf_document_page_no": "81",
        "answers": [str(number), f"No. {number}"],
        "data_split": "val",
    }


# name -> (folder and split of its files, columns and types, a row)
TABLES: dict[str, tuple[str, Mapping[str, pa.DataType], Any]] = {
    "docvqa": (
        "DocVQA/validation",
        {
            "questionId": TEXT,
            "question": TEXT,
            "question_types": TEXTS,
            "image": PICTURE,
            "docId": pa.int64(),
            "ucsf_document_id": TEXT,
            "ucsf_document_page_no": TEXT,
            "answers": TEXTS,
            "data_split": TEXT,
        },
        docvqa,
    ),
}


def rows_of(name: str, count: int) -> list[dict[str, Any]]:
    """Returns the first rows of a benchmark's table."""
    return [TABLES[name][2](number) for number in range(count)]


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, pa.DataType]) -> None:
    """Writes one file, with two rows in a row group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), pa.schema(list(columns.items()))), path, row_group_size=2)


def write(name: str, folder: Path, rows: Sequence[Mapping[str, Any]], shards: int = 1) -> list[Path]:
    """Writes the table of a benchmark into a repository's folder; returns its files."""
    place, columns, _ = TABLES[name]
    if place.endswith(".parquet"):
        write_table(folder / place, rows, columns)
        return [folder / place]
    paths = [folder / f"{place}-{number:05d}-of-{shards:05d}.parquet" for number in range(shards)]
    size = -(-len(rows) // shards)
    for number, path in enumerate(paths):
        write_table(path, rows[number * size : (number + 1) * size], columns)
    return paths
