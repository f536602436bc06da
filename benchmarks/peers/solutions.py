"""Full gradient flow solutions, and one exact product."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import gfs_core as gfs
from benchmarks.lib.data import digits, text_bytes
from benchmarks.lib.meters import clock
from benchmarks.lib.models import seeded
from benchmarks.lib.store import Row
from benchmarks.lib.trainings import Entropy, Squared
from benchmarks.peers.flows import Start, of_torchdiffeq, rk4, top_of
from benchmarks.peers.workloads import (
    Gpt2,
    MiniLM,
    Problem,
    Weights,
    Workload,
    cnn,
    flat,
    images,
    mlp,
    random_vector,
    sentences,
)
from gfs_core.loss.learned import Learned
from gfs_core.loss.objective import Objective
from gfs_core.loss.products import Hessian


@dataclass
class Full(Problem):
    """A training by gradient descent on a few examples, and a flow from there to the end or to a cutoff."""

    steps: int
    max_grads: int
    cutoff: float | None = None


def fulls(quick: bool) -> Iterator[Full]:
    """The problems; ``quick``: with a fiftieth of the gradients."""
    x, y = digits(20)
    wide = images(20)
    most = 2_000 if quick else 100_000
    yield Full("MLP, 20 digits, float64", mlp(32).double(), Squared(), (x.double(), y), 0.2, 1000, most)
    yield Full("MLP, 20 digits, float32", mlp(32), Squared(), (x, y), 0.2, 1000, most)
    model = cnn(4, wide[0]).double()
    yield Full("CNN, 20 images, float64", model, Squared(), (wide[0].double(), wide[1]), 0.1, 300, most // 5)
    yield Full("GPT-2, 4 rows", seeded(Gpt2), Entropy(), text_bytes(4, 32, " "), 0.2, 200, most // 10, 1e-3)
    yield Full("MiniLM, 4 sentences", seeded(lambda: MiniLM(4)), Squared(), sentences(4), 0.02, 5, most // 100)


def full(load: Full, affordable: float) -> Row:
    """Our full solution; what RK4 needs for the same time; RK4 where ``affordable`` seconds do; dopri5 for a part."""
    optimizer = torch.optim.SGD(load.model.parameters(), load.rate)
    for _ in range(load.steps):
        load.step(optimizer, load.data)

    def start(most: int = 10**9) -> Start:
        model = copy.deepcopy(load.model)
        return Start(load, model, load.data, top_of(load.loss, model, load.data), most)

    first, begin = start().top.value, clock()
    with torch.no_grad():
        row: Row = {"workload": load.name, "start": first, "loss": float(load.loss(load.model, load.data))}
    options: Row = {"learning_rate": load.rate, "rtol": 1e-3, "max_grads": load.max_grads, "loss_cutoff": load.cutoff}
    ours = gfs.gfs_sharpness(load.model, load.loss, load.data, **options)
    row |= {"seconds": clock() - begin, "gradients": ours.grad_evals + 2 * ours.hvps, "time": ours.time}
    row |= {"sharpness": ours.sharpness, "end_loss": ours.loss, "cutoff": load.cutoff, "reached": ours.converged}
    row |= {"reason": str(ours.reason).split(" (")[0].split(":")[0], "max_grads": load.max_grads}
    row["rk4_needs"] = int(4 * ours.time * min(first, ours.sharpness))
    per_gradient = row["seconds"] / row["gradients"]
    if ours.converged and row["rk4_needs"] * per_gradient <= affordable:
        then = start()
        row["rk4"] = rk4(1.0)(then, ours.time)
        row["rk4_difference"] = abs(top_of(load.loss, then.model, load.data).value / ours.sharpness - 1)
    part = min(1.0, max(500.0, 0.1 * affordable / per_gradient) / max(row["rk4_needs"], 1))
    row |= {"dopri5": None, "dopri5_part": part}
    try:
        row["dopri5"] = int(
            of_torchdiffeq("dopri5", 1e-3)(start(int(3 * part * row["rk4_needs"])), part * ours.time) / part
        )
    except (gfs.MeasurementError, AssertionError) as error:
        row["dopri5_failed"] = str(error) or type(error).__name__
    return row


def products(load: Workload, state: Weights, limit: float) -> Row:
    """Shortest seconds of our product and of a hand-written one, in turn, the gradient's graph kept and not."""
    objective = Objective(load.at(state), load.loss, [load.probed])
    params, hessian = objective.params, Hessian(objective, learned=Learned(double_backward_verified=True))
    vector = random_vector(params)

    def graph() -> tuple[Tensor, ...]:
        return torch.autograd.grad(load.loss(objective.model, load.probed), params, create_graph=True)

    def by_hand(grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        along = torch.stack([(g * v).sum() for g, v in zip(grads, vector, strict=True)]).sum()
        return torch.autograd.grad(along, params, retain_graph=True)

    def fresh() -> None:
        hessian.release()
        hessian(vector)

    kept = graph()
    hessian(vector)
    apart = flat(hessian(vector)) - flat(by_hand(kept))
    ways = {"gradient": objective.gradient, "hand": lambda: by_hand(kept), "ours": lambda: hessian(vector)}
    ways |= {"hand_with_graph": lambda: by_hand(graph()), "ours_with_graph": fresh}
    times: dict[str, list[float]] = {name: [] for name in ways}
    end = clock() + limit
    while len(times["ours"]) < 5 or (clock() < end and len(times["ours"]) < 300):
        for name, way in ways.items():
            begin = clock()
            way()
            times[name].append(clock() - begin)
    size = float(flat(hessian(vector)).norm())
    return {"workload": load.name, "difference": float(apart.norm()) / size} | {k: min(t) for k, t in times.items()}
