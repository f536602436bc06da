"""Fills the help of the options and log keys into the docstrings of the adapters."""

from __future__ import annotations

import re

from gfs_core.config import GFSConfig
from gfs_core.run.record import log_keys


def filled_in(docstring: str | None) -> str:
    """``docstring`` with one line per option in place of ``{options}``, and one per log key in place of ``{keys}``."""
    lines = {
        "options": [f"{name}: {text}" for name, text in GFSConfig.help().items()],
        "keys": [f"``{key}``: {text}" for key, text in log_keys().items()],
    }
    return re.sub(
        r"( *)\{(options|keys)\}",
        lambda found: "\n".join(found[1] + line for line in lines[found[2]]),
        docstring or "",
    )
