"""Writes docs/trainers.md from what the cases of test_clients do. Run: python -m tests.hf.table"""

from __future__ import annotations

import re
import tempfile
from importlib.metadata import version
from pathlib import Path

from tests.bitwise import assert_same
from tests.hf.clients import outcome
from tests.hf.test_clients import CASES, run

TARGET = Path(__file__).parents[2] / "docs" / "trainers.md"
HEAD = """# Trainers that were tried

Each line is a training, run without and with the callback: weights, optimizer state, random states, metrics and the
trainer's own log are bitwise the same in every one, and the measured loss is the trainer's own. The table is written by
`python -m tests.hf.table`; `tests/hf/test_clients.py` holds it. Versions: {versions}.

*Refuses* means: one warning, nothing is measured, training goes on; the warning ends with the line that mends it,
`GFSCallback(...).set_trainer(trainer)`. Where a model has no second derivative the products come from differences of
gradients, which cost two gradients each.

| trainer | `trainer.add_callback(GFSCallback())` | `GFSCallback().set_trainer(trainer)` |
|---|---|---|
"""


def cell(name: str, mode: str, folder: Path, plain: dict[str, object]) -> str:
    trainer, told, *_ = run(name, folder, mode)
    assert_same(plain, outcome(trainer))
    if not any("gfs/sharpness" in row for row in trainer.state.log_history):
        reason = re.search(r"evaluated again \((.*?)\); ", " ".join(told))
        return f"refuses: {reason.group(1).split('; replayed')[0] if reason else told}"
    for text in told:
        if "differences of gradients" in text:
            return "works, products from gradients"
    return "works, exact products"


def main() -> None:
    names = ("transformers", "accelerate", "trl", "peft", "sentence-transformers", "torch")
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for i, name in enumerate(CASES):
            plain = outcome(run(name, Path(folder) / f"{i}-plain", "without")[0])
            cells = [cell(name, mode, Path(folder) / f"{i}-{mode}", plain) for mode in ("add_callback", "set_trainer")]
            lines.append(f"| {name} | {cells[0]} | {cells[1]} |\n")
            print(lines[-1], end="", flush=True)
    versions = ", ".join(f"{n} {version(n)}" for n in names)
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(HEAD.format(versions=versions) + "".join(lines))


if __name__ == "__main__":
    main()
