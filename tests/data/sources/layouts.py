"""One small data set in every stored layout, written as its own programs write it: the fixtures of source tests."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from visor_jax.data.media import EmbeddedPicture
from visor_jax.data.records import parse_record
from visor_jax.data.sources.array_record import write_array_record

COUNT = 12
KINDS = ("PNG", "JPEG", "WEBP")


def picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (20 + number, 30, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, KINDS[number % 3])
    return file.getvalue()


def llava_records() -> list[dict[str, Any]]:
    """Single pictures, two pictures, no picture; one or two turns; with and without a task."""
    records = []
    for number in range(COUNT):
        names = [] if number % 4 == 3 else [f"images/{number}.png"] * (2 if number % 4 == 2 else 1)
        talk = [{"from": "human", "value": "<image>\n" * len(names) + f"What is {number}?"}]
        talk += [{"from": "gpt", "value": f"It is {number}."}]
        if number % 3 == 0:
            talk += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes, \u00e9."}]
        record: dict[str, Any] = {"id": f"r{number}", "conversations": talk}
        if names:
            record["image"] = names if len(names) > 1 else names[0]
        if number % 2:
            record["data_source"] = "odd"
        records.append(record)
    return records


def write_pictures(root: Path) -> None:
    (root / "images").mkdir(parents=True)
    for number in range(COUNT):
        (root / "images" / f"{number}.png").write_bytes(picture(number))


def write_llava(root: Path, name: str = "set.json") -> str:
    write_pictures(root)
    (root / name).write_text(json.dumps(llava_records()))
    return name


def write_llava_shards(root: Path) -> str:
    write_pictures(root)
    for shard in range(3):
        lines = map(json.dumps, llava_records()[4 * shard : 4 * shard + 4])
        (root / f"set-{shard:05d}-of-00003.jsonl").write_text("\n".join(lines) + "\n")
    return "set-*-of-00003.jsonl"


def held(name: str) -> dict[str, Any]:
    return {"bytes": picture(int(Path(name).stem)), "path": name}


def write_parquet(root: Path, row_group_size: int = 3) -> str:
    """As `datasets` writes LLaVA-OneVision-Data, in two shards; records of several pictures have `images`."""
    rows = []
    for record in llava_records():
        names = record.get("image")
        row = {"id": record["id"], "image": None, "images": None, "conversations": record["conversations"]}
        row |= {"image": held(names)} if isinstance(names, str) else {"images": [held(name) for name in names or []]}
        rows.append({**row, "data_source": record.get("data_source")})
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    message = pa.struct({"from": pa.string(), "value": pa.string()})
    texts = {"id": pa.string(), "data_source": pa.string()}
    schema = pa.schema({**texts, "image": image, "images": pa.list_(image), "conversations": pa.list_(message)})
    (root / "ai2d(cauldron,llava_format)").mkdir(parents=True)
    for shard in range(2):
        table = pa.Table.from_pylist(rows[6 * shard : 6 * shard + 6], schema)
        name = f"ai2d(cauldron,llava_format)/train-{shard:05d}-of-00002.parquet"
        pq.write_table(table, root / name, row_group_size=row_group_size)
    return "ai2d(cauldron,llava_format)/train-*.parquet"


def as_messages(record: dict[str, Any], *, parts: bool) -> dict[str, Any]:
    """A record in the layout of ms-swift (text with markers), or of TRL (image parts without a name)."""
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in record["conversations"]]
    if parts:
        for message in messages:
            count = message["content"].count("<image>")
            text = {"type": "text", "text": message["content"].replace("<image>\n", "")}
            message["content"] = [{"type": "image"}] * count + [text]
    names = record.get("image", [])
    images = {"images": [names] if isinstance(names, str) else names} if names else {}
    tasks = {key: record[key] for key in ("data_source",) if key in record}
    return {"id": record["id"], "messages": messages, **images, **tasks}


def write_messages(root: Path) -> str:
    write_pictures(root)
    lines = [json.dumps(as_messages(record, parts=False)) for record in llava_records()]
    (root / "swift.jsonl").write_text("\n".join(lines))
    return "swift.jsonl"


def write_message_parts(root: Path) -> str:
    """TRL's layout as a table: `images` holds the files, image parts mark their places."""
    root.mkdir()
    rows = [as_messages(record, parts=True) for record in llava_records()]
    for row in rows:
        row["images"] = [held(name) for name in row.get("images", [])]
        row.setdefault("data_source", None)
    pq.write_table(pa.Table.from_pylist(rows), root / "trl.parquet")
    return "trl.parquet"


def write_array_records(root: Path) -> str:
    root.mkdir()
    items = []
    for number, record in enumerate(llava_records()):
        parsed = parse_record(record, number)
        names = [str(name) for name in parsed.pictures]
        pictures = tuple(EmbeddedPicture(held(name)["bytes"], name) for name in names)
        items.append((replace(parsed, pictures=pictures), names))
    for shard in range(2):
        write_array_record(root / f"set-{shard:05d}-of-00002.array_record", items[6 * shard : 6 * shard + 6])
    return "set-*.array_record"


LAYOUTS = {
    "llava": ("llava", write_llava),
    "llava, shards": ("llava", write_llava_shards),
    "parquet": ("parquet", write_parquet),
    "messages": ("messages", write_messages),
    "messages, parts": ("messages", write_message_parts),
    "array_record": ("array_record", write_array_records),
}
