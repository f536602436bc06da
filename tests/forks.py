"""Processes of tests are forked from one that has imported the frameworks: each import of them takes seconds.

The server is Python's own; it starts with the first process that is asked of it, and serves the whole session.
"""

from __future__ import annotations

import multiprocessing

START = "forkserver"
multiprocessing.set_forkserver_preload(["tests.distributed.hf_run", "tests.distributed.lightning_run"])
