"""Data: reads samples from data sources and turns them into batches.

`sample` defines a sample. `sources` is the table of data sources; `mixture` combines several. Sources over stored files
share `sources.stored`: a format gives records, `records` parses them, `picture_paths` and `images` open pictures,
`videos` opens videos.
`tokenizer` and `chat` turn a conversation into token ids with a target mask, `anyres` cuts pictures into tiles,
`collate` pads and packs them into fixed shapes, and `pipeline` yields batches in a resumable order. `preview` draws
samples as a contact sheet; `check` reports for every record whether it can be used. Nothing here imports JAX.
"""
