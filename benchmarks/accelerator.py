"""What measuring costs on one GPU, in seconds, with GPT-2 of 124 million and a Llama of 1.1 billion weights.

Random weights, bytes of English text, float32 weights under bfloat16 autocast, AdamW. Writes accelerator.json and
accelerator.md. Needs transformers. Run (about two minutes): python -m benchmarks.accelerator [--out FOLDER]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from typing import Any

import torch
from torch import Tensor

import gfs_core as gfs
from benchmarks.growth.model import measurement
from benchmarks.lib.meters import timed
from benchmarks.lib.models import gpt2, llama
from benchmarks.lib.store import FOLDER, Row, Store
from benchmarks.lib.tables import table
from benchmarks.lib.trainings import gradient as take

GB = 1e9
TIERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("running", {"tier": "running"}),
    ("directional", {"tier": "directional", "probe_size": 2}),
    ("sharpness, probe_size=1", {"tier": "sharpness", "probe_size": 1}),
    ("gfs, probe_size=1", {"tier": "gfs", "probe_size": 1}),
)


# Model, sequences in a step, tokens in a sequence.
MODELS: dict[str, tuple[Callable[[], Any], int, int]] = {"GPT-2": (gpt2, 16, 1024), "Llama": (llama, 8, 1024)}


def batches(examples: int, length: int) -> Iterator[Tensor]:
    """Bytes of text, one after another."""
    text = torch.tensor(list(" ".join(topics.values()).encode()))
    rows = text[: len(text) // (examples * length) * examples * length].reshape(-1, examples, length)
    while True:
        yield from rows.cuda()


def run(name: str, keep: Callable[[Row], None], steps: int = 12) -> None:
    """One model: a gradient of its batch, then each tier by turns with steps; the first measurement of each is cold."""
    torch.manual_seed(0)
    make, examples, length = MODELS[name]
    model = make().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    text = batches(examples, length)

    def loss(batch: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            out: Tensor = model(input_ids=batch, labels=batch).loss
        return out

    def gradient(batch: Tensor) -> None:
        take(optimizer, loss(batch))

    def step() -> None:
        gradient(next(text))
        optimizer.step()

    for _ in range(3):
        step()
    seconds = median(timed(lambda: gradient(next(text)))[0] for _ in range(steps))
    torch.cuda.reset_peak_memory_stats()
    step()
    row: Row = {"model": name, "parameters": sum(p.numel() for p in model.parameters())}
    row |= {"examples": examples, "length": length, "gradient": seconds, "held": torch.cuda.memory_allocated() / GB}
    row |= {"peak": torch.cuda.max_memory_allocated() / GB, "tiers": []}
    for label, options in TIERS:
        options = {"every": 1, "max_overhead": None, "alarm": "off"} | options
        if label != "running":
            options |= {"running_every": None}
        monitor = gfs.StabilityMonitor(model, optimizer, gfs.GFSConfig(**options))
        found: list[tuple[float, Any]] = []
        size = options.get("probe_size")
        for _ in range(4):
            step()
            optimizer.zero_grad()  # as memory is free before a forward pass
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            batch = next(text)
            found.append(timed(lambda m=monitor, b=batch: m.step(loss, b)))  # type: ignore[misc]
        peak = torch.cuda.max_memory_allocated() / GB
        own = median(timed(lambda b=batch[:size]: gradient(b))[0] for _ in range(3))
        last = found[-1][1]
        tier = {"tier": label, "cold": found[0][0], "warm": median(s for s, _ in found[1:]), "peak": peak}
        if last is not None:
            ratio = last.stability_ratio or last.running_stability_ratio
            tier |= {"gradients": last.grad_evals, "products": last.hvps, "gradient_of_probe": own}
            tier |= {"ratio": ratio, "precision_error": last.precision_error, "reasons": list(last.reasons)}
            tier["model"] = own * measurement(last.grad_evals, last.hvps)
        row["tiers"].append(tier)
        keep(row)
        print(row | tier, flush=True)
        del monitor, found, last


HEAD = """# What measuring costs on a GPU

{device}, torch {torch}; float32 weights under bfloat16 autocast, scaled dot-product
attention, fused AdamW, random start, bytes of English text. Warm: median of three measurements after the
first. *Model*: (⅓ + gradients + 2 · products) gradients of the probe, the model of docs/cost.md, from the
counts of the last measurement and the seconds of a gradient measured beside it. The peak is the whole
process's, in GB.
"""


def render(results: dict[str, Any]) -> str:
    """The page."""
    lines = [HEAD.format(**results["environment"])]
    if "remark" in results:
        lines += [results["remark"], ""]
    head = ["measurement", "cold, ms", "warm, ms", "over that gradient", "gradients", "products", "warm / model"]
    for row in results["rows"]:
        rows = []
        for t in row["tiers"]:
            times = [f"{1e3 * t['cold']:.0f}", f"{1e3 * t['warm']:.0f}", f"{t['warm'] / row['gradient']:.1f}"]
            model = f"{t['warm'] / t['model']:.2f}" if "model" in t and t["tier"] != "running" else "–"
            counts = [t.get("gradients", "–"), t.get("products", "–")]
            rows.append([t["tier"], *times, *counts, model, f"{t['peak']:.1f}"])
        lines += [
            f"## {row['model']}, {row['parameters'] / 1e6:.0f} million weights", "",
            f"A gradient of {row['examples']} × {row['length']} tokens, as in a step of training: "
            f"{1e3 * row['gradient']:.0f} ms.", "",
            *table([*head, "peak, GB"], rows), "",
        ]  # fmt: skip
        if "remark" in row:
            lines += [row["remark"], ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=FOLDER)
    given = parser.parse_args()
    store = Store("accelerator", given.out, fresh=True, device=torch.cuda.get_device_name())
    done: dict[str, Row] = {}

    def keep(row: Row) -> None:
        done[row["model"]] = row
        store.put("rows", list(done.values()))
        store.write_page(render(store.results))

    for name in MODELS:
        run(name, keep)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
