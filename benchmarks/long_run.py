"""Does anything grow in 50,000 steps with measuring on? Memory, tensors, objects, descriptors, threads, hooks, state.

Real training on scikit-learn's digits in a plain loop, by Lightning and by the Hugging Face Trainer, each in a process
of its own, with measuring and without. Writes long_run.json and long_run.md beside itself.
Run (about 20 minutes): OMP_NUM_THREADS=1 python -m benchmarks.long_run [--steps 50000] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import gc
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import gfs_core as gfs
from benchmarks.lib.data import Batch, digits
from benchmarks.lib.models import seeded
from benchmarks.lib.store import FOLDER, Store
from benchmarks.lib.tables import table
from benchmarks.lib.trainings import gradient

SAMPLES = 40
OPTIONS: dict[str, Any] = {
    "tier": "gfs", "every": 20, "running_every": 5, "max_overhead": 0.25, "control": "cap", "alarm": "log",
}  # fmt: skip
EVERY = {"directional": 40, "running": 5, "batch_sharpness": 60, "gfs": 20}  # cheapest first
WHAT = ("rss", "tensors", "objects", "descriptors", "threads", "hooks", "state")
Sample = dict[str, float]


def net() -> nn.Module:
    layers = (nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(0.1))
    return seeded(lambda: nn.Sequential(nn.Linear(64, 32), *layers, nn.Linear(32, 10)))


def hooks(model: nn.Module, optimizer: Any) -> int:
    """All that is hooked to modules, weights and the optimizer."""
    held = [v for m in model.modules() for k, v in vars(m).items() if k.endswith("_hooks") and v]
    held += [p._backward_hooks for p in model.parameters() if p._backward_hooks]
    inner = getattr(optimizer, "optimizer", optimizer)
    held += [v for k, v in vars(inner).items() if k.endswith("_hooks") and v]
    return sum(map(len, held))


def sample(step: int, model: nn.Module, optimizer: Any, state: Callable[[], Any]) -> Sample:
    """What there is now, rubbish collected."""
    file = io.BytesIO()
    torch.save(state(), file)
    gc.collect()
    objects = gc.get_objects()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some modules warn when they are asked what they are
        tensors = sum(type(o) in (Tensor, nn.Parameter) for o in objects)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "step": step, "rss": pages * os.sysconf("SC_PAGE_SIZE") / 2**20, "tensors": tensors, "objects": len(objects),
        "descriptors": len(os.listdir("/proc/self/fd")), "threads": threading.active_count(),
        "hooks": hooks(model, optimizer), "state": len(file.getvalue()),
    }  # fmt: skip


def batches() -> Batch:
    return digits(1792)


def plain(steps: int, measure: bool, folder: Path) -> list[Sample]:
    """A loop of one's own."""
    x, y = batches()
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    config = gfs.GFSConfig(**OPTIONS, history=str(folder / "history.jsonl"))
    monitor = gfs.StabilityMonitor(model, optimizer, config) if measure else None
    if monitor is not None:
        monitor.schedule.every = dict(EVERY)
    order, found = torch.Generator().manual_seed(0), []
    for step in range(steps):
        rows = torch.randint(len(x), (32,), generator=order)
        batch = x[rows], y[rows]
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        gradient(optimizer, loss)
        if monitor is not None:
            monitor.step(lambda b: nn.functional.cross_entropy(model(b[0]), b[1]), batch, step, loss=loss)
        optimizer.step()
        if (step + 1) % (steps // SAMPLES) == 0:
            found.append(sample(step + 1, model, optimizer, monitor.state_dict if monitor else dict))
    return found


def lightning(steps: int, measure: bool, folder: Path) -> list[Sample]:
    """Lightning's Trainer, with its TensorBoard logger."""
    import lightning as L
    from lightning.pytorch.loggers import TensorBoardLogger

    from lightning_gfs import GFSCallback

    found: list[Sample] = []

    class Measured(GFSCallback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_fit_start(trainer, pl_module)
            for monitor in self.monitors.values():
                monitor.schedule.every = dict(EVERY)

    options = OPTIONS | {"history": str(folder / "history.jsonl")}
    callback = Measured(**options) if measure else None

    class Net(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step % (steps // SAMPLES) == 0:
                state = callback.state_dict if callback else dict
                found.append(sample(trainer.global_step, module, trainer.optimizers[0], state))

    data = torch.utils.data.TensorDataset(*batches())
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, callbacks=[Watch(), *([callback] if callback else [])],
        logger=TensorBoardLogger(folder), log_every_n_steps=50, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Net(), torch.utils.data.DataLoader(data, 32, shuffle=True, drop_last=True))
    return found


def huggingface(steps: int, measure: bool, folder: Path) -> list[Sample]:
    """The Hugging Face Trainer; what it logs, it keeps (``state.log_history``)."""
    import transformers

    from hf_gfs import GFSCallback

    transformers.utils.logging.set_verbosity_error()

    class Measured(GFSCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            super().on_train_begin(args, state, control, **given)
            assert self.monitor is not None
            self.monitor.schedule.every = dict(EVERY)

    found: list[Sample] = []
    callback = Measured(**OPTIONS, history=str(folder / "history.jsonl")) if measure else None

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            out = self.net(x)
            return {"loss": nn.functional.cross_entropy(out, labels), "logits": out}

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if state.global_step % (steps // SAMPLES) == 0:
                held = callback.monitor.state_dict if callback and callback.monitor else dict
                found.append(sample(state.global_step, given["model"], given["optimizer"], held))

    x, y = batches()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=32, learning_rate=0.05, optim="sgd",
        save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=steps // SAMPLES, use_cpu=True,
        dataloader_drop_last=True,
    )  # fmt: skip
    trainer = transformers.Trainer(
        Net(), arguments, train_dataset=[{"x": a, "labels": b} for a, b in zip(x, y, strict=True)],
        callbacks=[Watch(), *([callback] if callback else [])],
    )  # fmt: skip
    trainer.train()
    return found


WAYS = {"plain loop": plain, "Lightning": lightning, "Hugging Face Trainer": huggingface}


def growth(samples: list[Sample], name: str) -> tuple[float, float]:
    """By how much in 1,000 steps, over the last three quarters: a straight line's slope and its standard error."""
    late = samples[len(samples) // 4 :]
    x, y = np.array([s["step"] / 1000 for s in late]), np.array([s[name] for s in late])
    slope, start = np.polyfit(x, y, 1)
    rest = y - slope * x - start
    error = np.sqrt(rest @ rest / (len(x) - 2) / ((x - x.mean()) @ (x - x.mean())))
    return float(slope), float(error)


HEAD = """# 50,000 steps

    OMP_NUM_THREADS=1 python -m benchmarks.long_run

Digits, a network with BatchNorm and dropout, SGD with momentum. Measuring: GFS, directional and batch
sharpness, running estimate, `control='cap'`, early warning, history; Lightning with its TensorBoard logger.
Each run is a process of its own. *Growth* in 1,000 steps is the slope of a straight line through the last
three quarters of 40 samples, with its standard error. RSS in MiB (the allocator's, so it steps); *state* is
the monitor's in a checkpoint, in bytes; *objects* are those that Python's garbage collector knows.
The Hugging Face Trainer keeps whatever is logged in `state.log_history`: its memory grows by 1.4 KiB for
each measurement.
"""


def render(results: dict[str, Any]) -> str:
    """The page."""
    rows = []
    for run in results["runs"]:
        samples = run["samples"]
        for name in WHAT:
            if name == "state" and not run["measure"]:
                continue
            slope, error = growth(samples, name)
            values = [f"{samples[i][name]:.0f}" for i in (0, len(samples) // 2, -1)]
            same = slope == error == 0 or len({s[name] for s in samples[len(samples) // 4 :]}) == 1
            head = [run["way"], "on" if run["measure"] else "off", run["measurements"], f"{run['seconds']:.0f}"]
            told = "none" if same else f"{slope:.3g} ± {error:.1g}"
            rows.append([*(head if name == WHAT[0] else [""] * 4), name, *values, told])
    head = ["training", "measuring", "measurements", "seconds", "what", "first", "middle", "last"]
    made = f"Steps: {results['steps']}. torch {results['environment']['torch']}."
    return "\n".join([HEAD, made, "", *table([*head, "growth in 1,000 steps"], rows)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--one", nargs=2, help="one run: the training, and 'on' or 'off'; prints its samples")
    given = parser.parse_args()
    if given.one:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        way, measure = given.one[0], given.one[1] == "on"
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            samples = WAYS[way](given.steps, measure, Path(folder))
            run = {"way": way, "measure": measure, "seconds": time.perf_counter() - begin, "samples": samples}
            history = Path(folder) / "history.jsonl"
            run["measurements"] = len(gfs.read_history(history)) if measure else 0
        print(json.dumps(run))
        return
    store, runs = Store("long_run", given.out, fresh=True), []
    store.put("steps", given.steps)
    for way, measure in itertools.product(WAYS, ("on", "off")):
        own = ["-m", "benchmarks.long_run", "--steps", str(given.steps), "--one", way, measure]
        done = subprocess.run([sys.executable, *own], stdout=subprocess.PIPE, check=True, text=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
        print(way, measure, f"{runs[-1]['seconds']:.0f} s", flush=True)
        store.put("runs", runs)
        store.write_page(render(store.results))


if __name__ == "__main__":
    main()
