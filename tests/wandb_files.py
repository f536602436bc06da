"""What an offline run of W&B has written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, FILE_HEADER, HEADER = 32768, 7, 7  # bytes; LevelDB's log format after a header of the file
LAST = (1, 4)  # kinds of chunk that end a record: whole, last


def logged(folder: Path) -> list[dict[str, float]]:
    """The rows of the one run below ``folder``; a record may be cut by blocks, so the file cannot just be searched."""
    [path] = folder.rglob("*.wandb")
    rows = []
    for data in _records(path.read_bytes()):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items})
    return rows


def _records(data: bytes) -> Iterator[bytes]:
    at, record = FILE_HEADER, b""
    while at + HEADER <= len(data):
        room = BLOCK - at % BLOCK
        if room < HEADER:
            at += room  # the rest of a block that is too short for a header is padding
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in LAST:
            yield record
            record = b""
