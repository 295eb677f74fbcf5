"""Data: where samples come from and how they become batches.

`sample` fixes what a sample is. Sources: `glyphs` generates the default data set, `llava` reads the user's own files:
`json_records` the file, `records` the layouts of its records, `picture_paths` and `images` the pictures. On the way to
a batch: `tokenizer` and `chat` turn a conversation into token ids with a target mask, `anyres` cuts pictures into
tiles, `collate` and `pipeline` make fixed shapes of them, in an order that can be resumed. `preview` draws samples as a
contact sheet, `check` tells what becomes of every record. Nothing here imports JAX.
"""
