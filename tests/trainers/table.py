"""Writes docs/trainers.md from what the trainings of these tests do. Run: nox -s trainers"""

from __future__ import annotations

import re
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.bitwise import assert_same
from tests.hf.clients import outcome
from tests.hf.test_clients import CASES, run
from tests.trainers.jobs import LIGHTNING, OPTIMIZERS
from tests.trainers.test_jobs import measured, measured_setfit, optimized

TARGET = Path(__file__).parents[2] / "docs" / "trainers.md"
HEAD = """# Trainers that were tried

Each line is a training, run without and with the callback: weights, optimizer state, random states, metrics and the
trainer's own log are bitwise the same in every one, and the measured loss is the trainer's own. `nox -s trainers`
writes the page; `tests/hf/test_clients.py` and `tests/trainers/test_jobs.py` hold it.

*Refuses* means: one warning, nothing is measured, training goes on; the warning ends with the line that mends it.
Where a model has no second derivative the products come from differences of gradients, which cost two gradients each.

## The Hugging Face `Trainer`, and trainers built upon it

Versions: {hf}.

| trainer | `trainer.add_callback(GFSCallback())` | `GFSCallback().set_trainer(trainer)` |
|---|---|---|
"""
SETFIT = """
SetFit's trainer is its own, and its model is no `nn.Module`: {setfit}.

## Optimizers of the Trainer

BERT as a classifier, trained with `optim=` of the training arguments. The ratio of an optimizer whose threshold is not
known is empirical, along the steps that it takes. Versions: {optimizers}.

| optimizer | `trainer.add_callback(GFSCallback())` | `GFSCallback().set_trainer(trainer)` |
|---|---|---|
{rows}
## Lightning

Manual optimization (two optimizers in turn, gradients added up by hand, a closure), stochastic and exponential weight
averaging, accumulation by epoch, `overfit_batches` and plateaus work, with bitwise the same training and the sharpness
of a dense Hessian: `tests/lightning/test_jobs.py`. `training_step(dataloader_iter)` is refused.

Modules, data sets and batches of these packages, with `Trainer(callbacks=[GFSCallback()])`. Weights are the same to the
bit; the measured loss is that of training. Versions: {lightning}.

| package and model | what happens |
|---|---|
"""


def how(told: list[str]) -> str:
    """What the warnings say of the way in which it was measured."""
    words = ["products from gradients" for text in told if "differences of gradients" in text][:1] or ["exact products"]
    words += ["whole batches" for text in told if "whole batch" in text][:1]
    return f"works, {', '.join(words)}"


def cell(name: str, mode: str, folder: Path, plain: dict[str, object]) -> str:
    """What one way of the callback does in one trainer."""
    trainer, told, *_ = run(name, folder, mode)
    assert_same(plain, outcome(trainer))
    if not any("gfs/sharpness" in row for row in trainer.state.log_history):
        reason = re.search(r"evaluated again \((.*?)\); ", " ".join(told))
        return f"refuses: {reason.group(1).split('; replayed')[0] if reason else told}"
    return how(told)


def trainers() -> list[str]:
    """The lines of the first table."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for i, name in enumerate(CASES):
            plain = outcome(run(name, Path(folder) / f"{i}-plain", "without")[0])
            cells = [cell(name, mode, Path(folder) / f"{i}-{mode}", plain) for mode in ("add_callback", "set_trainer")]
            lines.append(f"| {name} | {cells[0]} | {cells[1]} |\n")
            print(lines[-1], end="", flush=True)
    return lines


def packages() -> list[str]:
    """The lines of the second table."""
    lines = []
    for name, job in LIGHTNING.items():
        plain = job.train([])
        with pytest.MonkeyPatch.context() as patch:
            weights, found, told = measured(name, patch)
        assert_same(plain, weights)
        assert any(m.sharpness is not None for m in found), name
        lines.append(f"| {name} | {how(told)} |\n")
        print(lines[-1], end="", flush=True)
    return lines


def optimized_rows() -> list[str]:
    """The lines of the table of optimizers."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for i, name in enumerate(OPTIMIZERS):
            plain = optimized(name, Path(folder) / f"{i}-plain", "without")[0]
            cells = []
            for mode in ("add_callback", "set_trainer"):
                left, rows, told = optimized(name, Path(folder) / f"{i}-{mode}", mode)
                assert_same(plain, left)
                late = any("weights after the step" in text for text in told)
                refused = "layer-wise" if "layer-wise" in "".join(told) else "no gradient is left"
                cells.append(f"works{', at the weights after the step' * late}" if rows else f"refuses: {refused}")
            lines.append(f"| {name} | {cells[0]} | {cells[1]} |\n")
            print(lines[-1], end="", flush=True)
    return lines


def versions(*names: str) -> str:
    """Names with versions."""
    return ", ".join(f"{n} {version(n)}" for n in names)


def main() -> None:
    """Run everything, and write the page."""
    hf = versions("transformers", "accelerate", "trl", "peft", "sentence-transformers", "setfit", "torch")
    lightning = versions("lightning", "pytorch-forecasting", "neuralforecast", "darts", "chemprop", "torch-geometric")
    optimizers = versions("schedulefree", "torch-optimi", "bitsandbytes", "galore-torch", "apollo-torch", "lomo-optim")
    text = HEAD.format(hf=hf) + "".join(trainers())
    [told] = measured_setfit()[1]
    text += SETFIT.format(
        optimizers=optimizers,
        rows="".join(optimized_rows()),
        setfit=told.removeprefix("gfs: ").rstrip("."),
        lightning=lightning,
    ) + "".join(packages())
    TARGET.write_text(text)


if __name__ == "__main__":
    main()
