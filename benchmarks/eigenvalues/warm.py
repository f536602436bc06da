"""What a warm measurement costs: each method along sequences of states."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.eigenvalues.methods import METHODS, truth
from benchmarks.eigenvalues.runs import DISTANCES, STATES, runs
from benchmarks.lib.store import Row


def run() -> Iterator[Row]:
    """One method along one sequence of states, the first of them cold."""
    for training in runs():
        batch, states = training.states()
        model = copy.deepcopy(training.model)
        truths: dict[int, float] = {}
        for step, state in states.items():
            model.load_state_dict(state)
            with sdpa_kernel(SDPBackend.MATH):
                truths[step] = truth(training, model, batch)
        for distance in DISTANCES:
            steps = [training.first + distance * i for i in range(STATES + 1)]
            for name, (method, tol) in METHODS.items():
                memory: dict[str, Any] = {}
                hvps, errors = [], []
                for step in steps:
                    measured = copy.deepcopy(training.model)
                    measured.load_state_dict(states[step])
                    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative of fused attention
                        value, products = method(training, measured, batch, memory, tol)
                    hvps.append(products)
                    errors.append(abs(value / truths[step] - 1))
                yield {
                    "run": training.name, "distance": distance, "method": name,
                    "cold": hvps[0], "hvps": hvps[1:], "errors": errors[1:],
                }  # fmt: skip
