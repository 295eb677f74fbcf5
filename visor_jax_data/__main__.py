"""Builds the data set `visor_jax_data` without TensorFlow, which `tfds build` needs: the same files, in one process.

python -m visor_jax_data --data_dir=OUT --config='{"name": "mine", "data": {"source": "llava", "root": "DATA",
    "path": "train.json"}}'
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from visor_jax.errors import RequestError, RunError
from visor_jax_data.visor_jax_data_dataset_builder import EXPECTED, Builder, VisorDataConfig, checked


def main(arguments: list[str] | None = None) -> int:
    """Builds; returns the exit status: 0, 1 for a failure, 2 for a wrong request."""
    what = "Stores the records of any source of visor_jax as a TFDS data set."
    parser = argparse.ArgumentParser(prog="python -m visor_jax_data", description=what)
    parser.add_argument("--data_dir", required=True, help="TFDS's folder of data sets, which data.root then names")
    parser.add_argument("--config", required=True, metavar="JSON", help=EXPECTED)
    parser.add_argument("--file_format", default="array_record", help="data.source=tfds reads array_record")
    given = parser.parse_args(arguments)
    try:
        builder = Builder(data_dir=given.data_dir, file_format=given.file_format, config=_config(given.config))
        if builder.is_prepared():
            raise RequestError(f"{builder.data_path}: exists already; expected another name, or remove it first")
        builder.download_and_prepare()
    except (RequestError, RunError) as error:
        print(f"visor_jax_data: {error}", file=sys.stderr)
        return 2 if isinstance(error, RequestError) else 1
    print(builder.data_path)
    return 0


def _config(text: str) -> VisorDataConfig:
    try:
        fields: Any = json.loads(text)
        config = checked(VisorDataConfig(**fields))
    except (ValueError, TypeError) as error:
        raise RequestError(f"--config={text[:80]}: {error}; expected {EXPECTED}") from None
    if config.beam:
        raise RequestError("beam=true: expected `tfds build ... --beam_pipeline_options=...`; this is one process")
    return config


if __name__ == "__main__":
    sys.exit(main())
