"""One training by one way to set its rate."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.lib.data import Batch
from benchmarks.lib.store import Row, rounded
from benchmarks.lib.trainings import epochs, gradient
from benchmarks.rate import Workload, validation_of
from benchmarks.zoo.parts import cosine

WARMUP = 0.05  # of the steps
GIVEN_UP = 50  # losses in a row that are not finite

Act = Callable[[Batch, Tensor], object]  # called with a batch and its loss, once the gradient is there


@dataclass(frozen=True)
class Method:
    """A way to set the rate.

    Attributes:
        cosine: whether the rate goes down by a cosine.
        warmup: steps of a linear warm-up before it, as a fraction of all.
        optimizer: of a model, a rate and a number of steps; in place of the workload's own.
        acts: what is done in each step, made for a training.
        free: whether it has no use for a base rate.
        priced: whether it takes time, so that it has fewer steps.
        source: what its results depend on beside this benchmark: ``"gfs_core"``, or the name of a package.
    """

    cosine: bool = True
    warmup: float = 0.0
    optimizer: Callable[[nn.Module, torch.optim.Optimizer, float, int], Any] | None = None
    acts: Callable[[Training], Act] | None = None
    free: bool = False
    priced: bool = True
    source: str = "torch"


class Training:
    """A training that goes on by a step at a time.

    Args:
        workload: what is trained.
        method: how its rate is set.
        rate: the base rate.
        seed: of weights and batches.
        steps: how many there are.

    Attributes:
        losses: of the steps taken.
        did: what a control has done, counted.
        ended: called after the last step.
    """

    def __init__(self, workload: Workload, method: Method, rate: float, seed: int, steps: int) -> None:
        self.workload, self.method, self.rate, self.seed, self.steps = workload, method, rate, seed, steps
        torch.manual_seed(seed)
        self.model = workload.model()
        self.optimizer: Any = workload.optimizer(self.model, rate)
        if method.optimizer is not None:
            self.optimizer = method.optimizer(self.model, self.optimizer, rate, steps)
        factor = cosine(steps, max(1, round(method.warmup * steps)) if method.warmup else 0)
        self.schedule = LambdaLR(self.optimizer, factor) if method.cosine else None
        self.losses: list[float] = []
        self.did: dict[str, int] = {}
        self.ended: Callable[[], object] = lambda: None
        self._act = method.acts(self) if method.acts is not None else None

    def loss_of(self, batch: Batch) -> Tensor:
        """Mean loss of a batch."""
        return self.workload.loss(self.model, batch)

    def batches(self, seed: int) -> Iterator[Batch]:
        """Training data without end."""
        return epochs(self.workload.data()[0], self.workload.batch, torch.Generator().manual_seed(seed))

    def run(self) -> Iterator[None]:
        """Take a step each time."""
        for _, batch in zip(range(self.steps), self.batches(self.seed), strict=False):
            loss = self.loss_of(batch)
            gradient(self.optimizer, loss)
            self.losses.append(loss.item())
            if self._act is not None:
                self._act(batch, loss)
            self.optimizer.step()
            if self.schedule is not None:
                self.schedule.step()
            yield
            if len(self.losses) >= GIVEN_UP and not any(map(math.isfinite, self.losses[-GIVEN_UP:])):
                break
        self.ended()

    def validation(self) -> float:
        """Loss on the validation data."""
        for way in ("eval", "train"):  # of a schedule-free optimizer, whose weights are means then
            if way == "train":
                self.model.eval()
                with torch.no_grad():
                    found = fmean(self.loss_of(batch).item() for batch in validation_of(self.workload))
                self.model.train()
            getattr(self.optimizer, way, lambda: None)()
        return found

    def weights(self) -> str:
        """A digest of all weights and buffers."""
        digest = hashlib.sha1(usedforsecurity=False)
        for tensor in self.model.state_dict().values():
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]


def untrained(workload: Workload, method: Method, seed: int) -> Row:
    """The loss before the first step."""
    return {"loss": rounded(Training(workload, method, workload.rate, seed, workload.steps).validation(), 5)}


def trained(workload: Workload, method: Method, rate: float, seed: int, steps: int) -> Row:
    """What is stored of a whole training."""
    began = time.thread_time()
    training = Training(workload, method, rate, seed, steps)
    for _ in training.run():
        pass
    seconds, loss = time.thread_time() - began, training.validation()
    return {
        "loss": rounded(loss, 5),  # ``None`` where it is not finite
        "rate": rounded(rate, 4),
        "steps": len(training.losses),
        "seconds": round(seconds, 2),
        "weights": training.weights(),
        **training.did,
    }
