"""The public names, options, log keys and commands are those of ``public_api.txt``: a change is a decision.

After one: ``python -m tests.test_public_api`` writes the list anew.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import gfs_core
import gfs_core.metrics
import hf_gfs
import lightning_gfs
from gfs_report.cli import app

LIST = Path(__file__).parent / "public_api.txt"


def public() -> list[str]:
    names = [f"gfs_core.{n}" for n in gfs_core.__all__]
    names += [f"gfs_core.metrics.{n}" for n in gfs_core.metrics.__all__]
    names += [f"{m.__name__}.{n}" for m in (lightning_gfs, hf_gfs) for n in m.__all__]
    names += [f"option {f.name} = {f.default!r}" for f in fields(gfs_core.GFSConfig)]
    names += [f"log key {key}" for key in gfs_core.log_keys()]
    names += [f"command gfs {c.callback.__name__}" for c in app.registered_commands if c.callback is not None]
    return sorted(names)


def test_public_names_are_the_committed_ones() -> None:
    assert public() == LIST.read_text().splitlines()


if __name__ == "__main__":
    LIST.write_text("\n".join(public()) + "\n")
