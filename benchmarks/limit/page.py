"""The page of all parts."""

from __future__ import annotations

from typing import Any

from benchmarks.limit import ablation, edge, price, start
from benchmarks.limit.training import BATCH, PLATEAU, STEPS
from benchmarks.limit.workloads import LENGTH

PARTS: dict[str, Any] = {"edge": edge, "start": start, "price": price, "ablation": ablation}
HEAD = f"""# Control by a limit of the stability ratio

    OMP_NUM_THREADS=1 python -m benchmarks.limit

Batches of {BATCH} if it does not say otherwise, {STEPS} steps, ReLU. Digits: 1437 images for training, 360 for
validation. Fashion-MNIST: 5000 and 1000. Characters of Python's manual, {LENGTH} at a time: 4500 and 500. Sentences of
that manual's eight longest topics, by topic: four fifths and one fifth. AdamW has torch's defaults, momentum is 0.9. A
run has *diverged* (†, with the number of such runs) if its loss is not finite or the mean loss of its last {PLATEAU}
steps is above the first loss. Such runs count with what they came to. A run that falls back to guessing, with a loss
just below the first, is not marked; the accuracy shows it.
"""


def render(results: dict[str, Any]) -> str:
    """The page, with what is missing of each part."""
    out = [HEAD]
    for name, part in PARTS.items():
        rows = results.get(name, {})
        if rows:
            out += part.render(results)
        if len(rows) < part.EXPECTED:
            out += [f"*{name}: {part.EXPECTED - len(rows)} of {part.EXPECTED} runs are missing.*", ""]
    made = results["environment"]
    out.append(f"torch {made['torch']}, Python {made['python']}, one thread.")
    return "\n".join(out) + "\n"
