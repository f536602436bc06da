"""What rules of others read through hooks of modules, and free signals lack."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_Step = TypeVar("_Step")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Hooks:
    """Watches the modules of a model while it trains; training stays what it is.

    Attributes:
        whole: by name, a value for each step. ``kurtosis``: the largest :func:`kurtosis` of what a module returns, over
            those that trainscope 1.8.1 keeps (``scope.py``): without children, and with weights of their own; where one
            runs more than once in a step, its last run counts. ``guard_ratio``: as in :class:`GuardRatio`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.whole: dict[str, list[float]] = {"kurtosis": [], "guard_ratio": []}
        self._model = model
        self._ratio = GuardRatio()
        self._kurtosis: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}  # norms, of the gradients of what modules return
        self._listening = False

    def steps(self, steps: Iterable[_Step]) -> Iterator[_Step]:
        """The steps of a training, watched; what is computed between two of them by others is not."""
        handles = [
            module.register_forward_hook(self._hook(name, module)) for name, module in self._model.named_modules()
        ]
        try:
            self._listening = True
            for step in steps:
                self._listening = False
                self._write()
                yield step
                self._listening = True
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, module: nn.Module) -> Any:
        weights = any(True for _ in module.parameters(recurse=False))
        kept = weights and not any(True for _ in module.children())
        guarded = not isinstance(module, _CONTAINERS) and (weights or name != "")

        def hook(module: nn.Module, given: Any, output: Any) -> None:
            if not self._listening:
                return
            tensors = [x for x in (output if isinstance(output, tuple) else (output,)) if isinstance(x, Tensor)]
            if kept and tensors:
                self._kurtosis[name] = kurtosis(tensors[0])
            for x in tensors if guarded else ():
                if x.requires_grad:
                    x.register_hook(lambda gradient: self._heard(name, gradient))

        return hook

    def _heard(self, name: str, gradient: Tensor | None) -> None:
        if self._listening and gradient is not None:  # it is where an output was not used
            norm = gradient.detach().float().norm()
            known = self._gradients.get(name)
            self._gradients[name] = norm if known is None else torch.maximum(known, norm)

    def _write(self) -> None:
        outputs = list(self._kurtosis.values())
        self.whole["kurtosis"].append(float(torch.stack(outputs).max()) if outputs else math.nan)
        norms = dict(self._gradients)
        for name, weight in self._model.named_parameters():
            if weight.grad is not None:
                norms.setdefault(name, weight.grad.float().norm())
        values = torch.stack(list(norms.values())).tolist() if norms else []
        self.whole["guard_ratio"].append(self._ratio.after(dict(zip(norms, values, strict=True))))
        self._kurtosis.clear()
        self._gradients.clear()


def kurtosis(x: Tensor) -> Tensor:
    """The excess kurtosis of all entries, 0 where they are equal (trainscope 1.8.1, ``core/metrics.py``)."""
    with torch.no_grad():
        flat = x.detach().float().flatten()
        deviation = flat.std(unbiased=False) if len(flat) else flat.new_zeros(())
        return torch.where(deviation == 0, 0.0, ((flat - flat.mean()) / deviation).square().square().mean() - 3)


class GuardRatio:
    """The largest norm of a gradient over its exponential mean, as stabilityguard 0.3.0 takes it by default.

    Its ``core/guarded_optimizer.py`` looks at each weight, and at what each module returns unless it is a mere
    container (``core/hooks.py``). By its ``core/spike_detector.py`` the mean has a memory of 0.99 and includes the norm
    of the step itself; a norm of at most 0.01 raises no alarm, nor do the first ten steps. What is not finite does so.
    The rest of the package (curvature, own momentum, clipping, calibration) has to be asked for.
    """

    def __init__(self) -> None:
        self._means: dict[str, float] = {}
        self._steps = 0

    def after(self, norms: Mapping[str, float]) -> float:
        """The ratio at the next step, whose norms these are by name; -∞: there is none to judge."""
        self._steps += 1
        largest = -math.inf
        for name, norm in norms.items():
            if not math.isfinite(norm):
                largest = math.inf
                continue
            mean = self._means[name] = 0.99 * self._means.get(name, norm) + 0.01 * norm
            if self._steps > 10 and norm > 0.01:
                largest = max(largest, norm / mean)
        return largest
