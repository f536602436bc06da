"""What watching costs where nothing is measured: an idle step of the monitor, and the import of the package.

Writes idle.json and idle.md. Run (half a minute): OMP_NUM_THREADS=1 python -m benchmarks.idle [steps] [import]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

import gfs_core as gfs
from benchmarks.lib.meters import timed
from benchmarks.lib.models import dense, seeded
from benchmarks.lib.store import Row, Store
from benchmarks.lib.tables import table
from benchmarks.lib.trainings import entropy
from benchmarks.lib.trainings import step as train

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=0.1),
    "AdamW": partial(torch.optim.AdamW, lr=1e-3),
}
GROUPS = (1, 4)  # parameter groups
BLOCKS, STEPS = 25, 100  # blocks of steps that are timed, by turns with those of the other cases
INTERPRETERS = 4
IMPORTS = """
import json, time
times = [time.process_time()]
import torch
times.append(time.process_time())
import gfs_core
times.append(time.process_time())
print(json.dumps([1e3 * (b - a) for a, b in zip(times, times[1:])]))
"""


class Case:
    """A training of a small network that is watched, and never measured."""

    def __init__(self, optimizer: str, groups: int, alarm: Any, loss_given: bool) -> None:
        self.name = {"optimizer": optimizer, "groups": groups, "alarm": alarm, "loss_given": loss_given}
        self.model = seeded(lambda: dense(64, 64, 10))
        params = list(self.model.parameters())
        self.optimizer = OPTIMIZERS[optimizer]([{"params": params[i::groups]} for i in range(groups)])
        config = gfs.GFSConfig(tier="sharpness", every=10**9, running_every=None, alarm=alarm)
        self.monitor = gfs.StabilityMonitor(self.model, self.optimizer, config)
        self.batch = torch.randn(32, 64), torch.randint(10, (32,))
        self.loss = entropy(self.model, self.batch).detach() if loss_given else None
        self.steps = 0
        self.monitor.step(self.loss_of, self.batch, 0, loss=self.loss)  # may measure: it is the first

    def loss_of(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean loss of one batch."""
        return entropy(self.model, batch)

    def watch(self, steps: int) -> None:
        """So many idle steps."""
        for _ in range(steps):
            self.steps += 1
            assert self.monitor.step(self.loss_of, self.batch, self.steps, loss=self.loss) is None

    def train(self, steps: int) -> None:
        """So many steps of the training itself."""
        for _ in range(steps):
            train(self.optimizer, self.loss_of(self.batch))


def idle_steps() -> list[Row]:
    """Microseconds of an idle step and of a training step in each case, block by block in turn."""
    cases = [Case(*made) for made in itertools.product(OPTIMIZERS, GROUPS, ("off", "log"), (False, True))]
    watched: list[list[float]] = [[] for _ in cases]
    trained: list[list[float]] = [[] for _ in cases]
    for case in cases:
        case.watch(STEPS)
        case.train(STEPS)
    for _ in range(BLOCKS):
        for case, idle, training in zip(cases, watched, trained, strict=True):
            idle.append(1e6 * timed(partial(case.watch, STEPS), time.process_time)[0] / STEPS)
            training.append(1e6 * timed(partial(case.train, STEPS // 10), time.process_time)[0] / (STEPS // 10))
    return [
        {**c.name, "median": median(w), "least": min(w), "training_step": median(t)}
        for c, w, t in zip(cases, watched, trained, strict=True)
    ]


def imports() -> list[Row]:
    """Milliseconds of the processor for torch, then for the package, in fresh interpreters; the first may compile."""
    compiled = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}
    rows = []
    for _ in range(INTERPRETERS + 1):
        done = subprocess.run([sys.executable, "-c", IMPORTS], stdout=subprocess.PIPE, check=True, env=compiled)
        rows.append(dict(zip(("torch", "gfs_core"), json.loads(done.stdout), strict=True)))
    return rows[1:]


HEAD = f"""# Where nothing is measured

    OMP_NUM_THREADS=1 python -m benchmarks.idle

torch {{torch}}, Python {{python}}, one thread. Times are of the processor. Other work shared the machine: ratios and
the least times say more than medians.

## An idle step

`StabilityMonitor.step` where no measurement is due, in microseconds: median and least of {BLOCKS} blocks of {STEPS}
steps, by turns with the other cases. Beside it a training step of the same small network (an MLP 64–64–10, batch of
32): the smaller the network, the more an idle step weighs.
"""
IMPORT = f"""
## The import

Milliseconds for `import torch`, and for `import gfs_core` after it, in {INTERPRETERS} fresh
interpreters with byte code beside the sources, as an installed package has it: median, least.
"""


def render(results: dict[str, Any]) -> str:
    """The page."""
    rows = [
        [
            r["optimizer"], r["groups"], r["alarm"], "yes" if r["loss_given"] else "no", f"{r['median']:.1f}",
            f"{r['least']:.1f}", f"{r['training_step']:.0f}", f"{r['median'] / r['training_step']:.1%}",
        ]
        for r in results["steps"]
    ]  # fmt: skip
    head = ["optimizer", "parameter groups", "alarm", "loss given", "idle step, µs: median", "least"]
    both = {name: [r[name] for r in results["import"]] for name in ("torch", "gfs_core")}
    ratio = median(r["gfs_core"] / r["torch"] for r in results["import"])
    cells = [[name, f"{median(v):.0f}", f"{min(v):.0f}"] for name, v in both.items()]
    lines = [
        HEAD.format(**results["environment"]), *table([*head, "training step, µs", "idle / training"], rows),
        IMPORT, *table(["import", "median", "least"], cells), "",
        f"gfs_core / torch, in the same interpreter: {ratio:.3f} (median).",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """The parts that are named, or both, and the page."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser("benchmarks.idle", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("parts", nargs="*", default=["steps", "import"], metavar="PART", help="steps, import")
    parts = parser.parse_args().parts
    store = Store("idle")
    for name, make in (("steps", idle_steps), ("import", imports)):
        if name in parts:
            store.put(name, make())
    store.write_page(render(store.results))


if __name__ == "__main__":
    main()
