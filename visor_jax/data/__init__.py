"""Data: where samples come from and how they become batches.

`sample` fixes what a sample is. `sources` is the table of data sources; the one over the user's own files has
`json_records` for the file, `records` the layouts of its records, `picture_paths` and `images` the pictures. On the way
to a batch: `tokenizer` and `chat` turn a conversation into token ids with a target mask, `anyres` cuts pictures into
tiles, `collate` and `pipeline` make fixed shapes of them, in an order that can be resumed. `preview` draws samples as a
contact sheet, `check` tells what becomes of every record. Nothing here imports JAX.
"""
