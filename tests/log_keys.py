"""Log keys as a test compares them with those that the package documents."""

from __future__ import annotations

from collections.abc import Iterable

import gfs_core as gfs


def documented(keys: Iterable[str]) -> set[str]:
    """The keys, with ``LAYER`` in place of the name of a layer where the documented key has it."""
    known = gfs.log_keys()
    by_layer = {key: f"{key.rpartition('/')[0]}/LAYER" for key in keys}
    return {key if by_layer[key] not in known else by_layer[key] for key in by_layer}
