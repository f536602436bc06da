"""What half precision does to the sharpness: autocast and half-precision weights, exact products and differences.

Writes precision.md. Run: OMP_NUM_THREADS=1 python -m benchmarks.precision
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import gfs_core as gfs
from benchmarks.lib.data import Batch, digits
from benchmarks.lib.models import Rows, dense, digits_cnn, seeded
from benchmarks.lib.store import FOLDER
from benchmarks.lib.tables import row, table
from benchmarks.lib.trainings import step
from gfs_core.loss.learned import PrecisionChoice

SEEDS = 5
STEPS = 150


ABOUT = f"""# What half precision does to the sharpness

Digits, 256 examples, after {STEPS} steps; {SEEDS} seeds, relative errors of the value from the least to the
largest. *left out*: the residual says by itself that the value is not worth giving. Measured on a CPU.
"""
FOUND = """
Exact products bear bfloat16: that is what `auto` leaves to training's own precision; a monitor checks it
against float32 at the first measurement and at every tenth, and goes over to float32 where the value changes
by more than 5 %. Differences of gradients, the flow, and everything in float16 are computed in float32. What
is left of their errors on the CNN is its ReLUs: over any finite step some of them switch."""
MODELS: dict[str, Callable[[], nn.Module]] = {
    "MLP": lambda: dense(64, 32, 10),
    "CNN": digits_cnn,
    "transformer": lambda: Rows("gelu", places=False),
}


def loss(model: nn.Module, batch: Batch, autocast: torch.dtype | None = None) -> Tensor:
    """Cross-entropy in float32 of logits in whatever precision."""
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        logits = model(batch[0])
    return nn.functional.cross_entropy(logits.float(), batch[1])


def trained(make: Callable[[], nn.Module], seed: int, data: Batch) -> nn.Module:
    """After some steps of SGD with momentum."""
    model = seeded(make, seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(STEPS):
        rows = torch.randint(0, len(data[1]), (64,))
        step(optimizer, loss(model, (data[0][rows], data[1][rows])))
    return model


def error(model: nn.Module, batch: Batch, dtype: torch.dtype, where: str, hvp: Any, precision: PrecisionChoice) -> str:
    """Relative error of the sharpness; of half-precision weights, against the same weights in float32."""
    if where == "autocast":
        true, measured, inputs = model, model, batch
    else:
        measured, inputs = copy.deepcopy(model).to(dtype), (batch[0].to(dtype), batch[1])
        true = copy.deepcopy(measured).float()
    value = gfs.sharpness(true, loss, batch, tol=1e-4, max_hvps=2000).value

    def loss_fn(m: nn.Module, b: Batch) -> Tensor:
        return loss(m, b, dtype if where == "autocast" else None)

    found = gfs.sharpness(measured, loss_fn, inputs, hvp=hvp, precision=precision)
    off = abs(found.value / value - 1)
    return f"{off:.0e}" if found.error_bound <= 0.1 else "left out"


def main() -> None:
    x, y = digits(centre=0.0)
    rows = []
    warnings.simplefilter("ignore")
    for name, make in MODELS.items():
        models = [trained(make, seed, (x[:1500], y[:1500])) for seed in range(SEEDS)]
        for where in ("autocast", "weights"):
            for dtype in (torch.bfloat16, torch.float16):
                for hvp in ("exact", "gradients"):
                    cells = []
                    for precision in ("training", "auto"):
                        found = [error(m, (x[:256], y[:256]), dtype, where, hvp, precision) for m in models]  # type: ignore[arg-type]
                        cells.append(_range(found))
                    rows.append([name, f"{where}, {str(dtype)[6:]}", hvp, *cells])
                    print(row(rows[-1]), flush=True)
    head = ["model", "half precision", "products", '`precision="training"`', '`precision="auto"` (default)']
    (FOLDER / "precision.md").write_text("\n".join([ABOUT, *table(head, rows), FOUND]) + "\n")


def _range(found: list[str]) -> str:
    values = sorted(float(f) for f in found if f != "left out")
    out = len(found) - len(values)
    span = f"{values[0]:.0e} – {values[-1]:.0e}" if values else ""
    return ", ".join(s for s in (span, f"{out} of {len(found)} left out" if out else "") if s)


if __name__ == "__main__":
    main()
