"""What an offline run of W&B has written."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, FILE_HEADER, HEADER = 32768, 7, 7  # bytes; LevelDB's log format after a header of the file
LAST = (1, 4)  # kinds of chunk that end a record: whole, last


def logged(folder: Path) -> list[dict[str, float]]:
    """The rows of the one finished run below ``folder``, once its own process has written the last record.

    A record may be cut by blocks, so the file cannot just be searched.
    """
    [path] = folder.rglob("*.wandb")
    end = time.monotonic() + 60
    while True:
        records = [Record.FromString(data) for data in _records(path.read_bytes())]
        if any(r.WhichOneof("record_type") == "exit" for r in records):
            break
        assert time.monotonic() < end, f"{path} has no end after 60 s"
        time.sleep(0.1)
    rows = [r.history.item for r in records if r.WhichOneof("record_type") == "history"]
    return [{i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items} for items in rows]


def _records(data: bytes) -> Iterator[bytes]:
    at, record = FILE_HEADER, b""
    while at + HEADER <= len(data):
        room = BLOCK - at % BLOCK
        if room < HEADER:
            at += room  # the rest of a block that is too short for a header is padding
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if at + HEADER + length > len(data):
            return  # still being written
        record += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in LAST:
            yield record
            record = b""
