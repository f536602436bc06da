"""Ways to choose a learning rate by short runs, compared on tables of losses. Writes pilots.json and pilots.md.

The losses of short and whole trainings are tabulated once, over rate, length, share of the data and seed. Each way to
search is then tried on the tables.

Run (about twenty minutes): OMP_NUM_THREADS=1 python -m benchmarks.pilots
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from statistics import fmean, median

import torch

from benchmarks.lib.store import Row, Store, rounded
from benchmarks.lib.tables import table
from benchmarks.lib.trainings import gradient
from benchmarks.pilots.trainings import LANGUAGE, WORKLOADS, endless
from benchmarks.rate import WARMUP, Batches, Workload, validation_of
from benchmarks.zoo.parts import cosine
from gfs_core.search.part import part_of
from gfs_core.search.pilots import MARGIN, Choice, Pilot, choose, enclosed, held
from gfs_core.search.ramp import is_lost

WHOLE = [q / 4 for q in range(-5, 8)]  # of whole trainings: logarithms of the rate over the base rate
SHORT = [h / 2 for h in range(-3, 5)]  # of short ones, a quarter lower with the second seed
RUNS = [(0.1, 1.0), (0.1, 0.1), (0.2, 1.0), (0.2, 0.2), (0.4, 1.0)]  # shares of the steps and of the data
STARTS = (0.0, 0.0, 0.0, 0.5, -0.5)  # of a search, from the best of a fifth of the steps, about as ramps begin it
DRIFTS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
MARGINS = (0.35, 0.5, 0.7, 1.0)


# --- tables of losses -------------------------------------------------------------------------------------------------


def trained(workload: Workload, rate: float, steps: int, data: float, seed: int) -> Row:
    """A short or a whole training: its steps, its first loss, that on validation data and that of its last steps."""
    torch.manual_seed(seed)
    model = workload.model()
    optimizer = workload.optimizer(model, rate)
    factor = cosine(workload.steps, max(1, round(WARMUP * workload.steps)))
    batches = part_of(Batches(workload.data()[0], workload.batch, seed), data)
    losses: list[float] = []
    for step, batch in zip(range(steps), endless(batches), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate * factor(step * workload.steps // steps)
        loss = workload.loss(model, batch)
        losses.append(loss.item())
        lost = steps < workload.steps and step % 10 == 9 and is_lost(losses)
        if lost or not math.isfinite(losses[-1]):
            return {"taken": len(losses), "first": losses[0], "loss": math.inf, "last": math.inf}
        gradient(optimizer, loss)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        loss = torch.stack([workload.loss(model, batch) for batch in validation_of(workload)]).mean()
    return {"taken": steps, "first": losses[0], "loss": loss.item(), "last": fmean(losses[-16:])}


def tabulated(workload: Workload, seed: int) -> Row:
    """Losses by share of the steps, share of the data, and rate."""
    found: Row = {}
    for steps, data in RUNS:
        for short in SHORT:
            at = short - 0.25 * seed
            run = trained(workload, workload.rate * 10**at, round(steps * workload.steps), data, seed)
            found[f"{steps} {data} {at}"] = rounded(run, 5)
    for at in WHOLE:
        found[f"1.0 1.0 {at}"] = rounded(trained(workload, workload.rate * 10**at, workload.steps, 1.0, seed), 5)
    return found


# --- ways to search ---------------------------------------------------------------------------------------------------


class Table:
    """Answers a search from a table; counts what it costs.

    Args:
        rows: of :func:`tabulated`.
        steps: of the training.
        judged: ``"loss"`` or ``"last"``, what pilots are judged by.
    """

    def __init__(self, rows: Row, steps: int, judged: str = "loss") -> None:
        self.rows, self.steps, self.judged = rows, steps, judged
        self.spent: dict[str, float] = {}
        whole = {float(k.split()[2]): v["loss"] for k, v in rows.items() if k.startswith("1.0 1.0 ")}
        self.whole = {at: math.inf if loss is None else loss for at, loss in sorted(whole.items())}
        self.places = sorted(float(k.split()[2]) for k in rows if k.startswith("0.2 1.0 "))

    def pilot(self, rate: float, steps: float, data: float) -> Pilot:
        """The short run of the nearest rate; lost above the highest."""
        at = math.log10(rate)
        near = min(self.places, key=lambda place: abs(place - at))
        if at > near + 0.3:
            return Pilot(rate, round(steps * self.steps), 1, 1.0, (), data)
        key = f"{steps} {data} {near}"
        row = self.rows[key]
        self.spent[key] = row["taken"] / self.steps
        loss = row[self.judged]
        return Pilot(
            10**near, round(steps * self.steps), row["taken"], row["first"], () if loss is None else (loss,), data
        )

    def search(self, start: float, steps: float, data: float) -> list[Pilot]:
        """The pilots of a search that costs no more than four fifths of a training."""
        before = sum(self.spent.values())
        afford = lambda: sum(self.spent.values()) - before + steps <= max(0.8, 4 * steps)  # noqa: E731
        return enclosed(lambda rate: self.pilot(rate, steps, data), start, afford)

    def excess(self, rate: float) -> float:
        """Of the loss of a whole training over the least one of rates half a decade apart."""
        best = min(v for at, v in self.whole.items() if (2 * at).is_integer())
        places = list(self.whole)
        at = min(max(math.log10(rate), places[0]), places[-1])
        below, above = next((a, b) for a, b in itertools.pairwise(places) if a <= at <= b)
        share = (at - below) / (above - below)
        if math.inf in (self.whole[below], self.whole[above]):
            return self.whole[below if share < 0.5 else above] / best - 1
        return math.exp((1 - share) * math.log(self.whole[below]) + share * math.log(self.whole[above])) / best - 1


Search = Callable[[Table, float], float]  # the rate that is found from a start


def chosen(pilots: Sequence[Pilot], margin: float = MARGIN) -> float:
    """What pilots point to for their own length; 0 where all were lost."""
    choice: Choice | None = choose(pilots, pilots[0].steps)
    if choice is None:
        return 0.0
    return choice.rate * margin / MARGIN if choice.parabola is None and choice.cliff is not None else choice.rate


def lowered(rate: float, steps: float, drift: float) -> float:
    return rate * steps**drift


def learnt(table: Table, start: float, steps: float, data: float) -> list[Pilot]:
    """Pilots over a part of the data, or over all where those learn nothing."""
    pilots = table.search(start, steps, data)
    return pilots if data == 1 or any(p.learnt for p in pilots) else table.search(start, steps, 1.0)


def one(steps: float, data: float, drift: float = 0.0, margin: float = MARGIN) -> Search:
    """Pilots of one length."""
    return lambda table, start: lowered(chosen(learnt(table, start, steps, data), margin), steps, drift)


def both(drift: float, margin: float) -> Search:
    """A tenth of steps and data, then a fifth; the mean of what they point to."""

    def search(table: Table, start: float) -> float:
        short = learnt(table, start, 0.1, 0.1)
        best = min(held(short), key=lambda p: p.loss).rate
        long = table.search(best, 0.2, 1.0 if short[0].share == 1 else 0.2)
        rates = [lowered(chosen(p, margin), s, drift) for p, s in ((short, 0.1), (long, 0.2))]
        return math.sqrt(rates[0] * rates[1])

    return search


def extrapolated(short: float, long: float, damping: float) -> Search:
    """The best rate over the logarithm of the length, part of the way to which two lengths point."""

    def search(table: Table, start: float) -> float:
        first = chosen(table.search(start, short, 1.0))
        second = chosen(table.search(first or start, long, 1.0))
        if not first or not second:
            return second
        further = damping * math.log(1 / long) / math.log(long / short) * math.log10(second / first)
        return second * 10 ** min(max(further, -0.5), 0.5)

    return search


def halving(table: Table, start: float) -> float:
    """Successive halving (Jamieson & Talwalkar 2016): a tenth, of the best two a fifth, of the best one two fifths."""
    pilots = table.search(start, 0.1, 1.0)
    for steps, kept in ((0.2, 2), (0.4, 1)):
        best = sorted(held(pilots), key=lambda p: p.loss)[:kept]
        pilots = [table.pilot(p.rate, steps, 1.0) for p in best]
    return pilots[0].rate


def lowest(within: float) -> Search:
    """The lowest rate whose pilot is as good as the best one, within so much."""

    def search(table: Table, start: float) -> float:
        pilots = held(table.search(start, 0.2, 1.0))
        best = min(p.loss for p in pilots)
        return min(p.rate for p in pilots if p.loss <= (1 + within) * best)

    return search


# --- comparison -------------------------------------------------------------------------------------------------------

FIXED: dict[str, Search] = {
    "a fifth of the steps": one(0.2, 1.0),
    "a fifth of the steps, judged on training data": one(0.2, 1.0),
    "a fifth of the steps, the lowest rate within 10 %": lowest(0.1),
    "a tenth of the steps": one(0.1, 1.0),
    "two fifths of the steps": one(0.4, 1.0),
    "a tenth and a fifth, half of the way further": extrapolated(0.1, 0.2, 0.5),
    "a fifth and two fifths, half of the way further": extrapolated(0.2, 0.4, 0.5),
    "successive halving": halving,
    "a tenth of steps and data": one(0.1, 0.1),
    "a fifth of steps and data": one(0.2, 0.2),
    "a tenth of steps and data, power .15, margin .5: as it is": one(0.1, 0.1, 0.15, 0.5),
}
ALL = list(itertools.product(DRIFTS, MARGINS))
FAMILIES: dict[str, list[Search]] = {
    "a fifth of the steps": [one(0.2, 1.0, d, m) for d, m in ALL],
    "two fifths of the steps": [one(0.4, 1.0, d, m) for d, m in ALL],
    "a tenth of steps and data": [one(0.1, 0.1, d, m) for d, m in ALL],
    "a fifth of steps and data": [one(0.2, 0.2, d, m) for d, m in ALL],
    "a tenth of both, then a fifth": [both(d, m) for d, m in ALL],
}
Result = tuple[str, float, float]  # workload, excess, cost


def searched(search: Search, results: Row, judged: str = "loss") -> list[Result]:
    """What a way to search comes to, for each workload, seed and start."""
    found = []
    for key, rows in results.items():
        name = key.split(" | ")[0]
        pilots = held([Table(rows, 1000).pilot(10**at, 0.2, 1.0) for at in Table(rows, 1000).places])
        best = min(pilots, key=lambda p: p.loss).rate
        for offset in STARTS:
            tried = Table(rows, WORKLOADS[name].steps, judged)
            rate = search(tried, best * 10**offset)
            found.append((name, tried.excess(max(rate, 1e-9)), sum(tried.spent.values())))
    return found


def left_out(family: Sequence[Search], results: Row) -> list[Result]:
    """The same with, for each workload, the member with the least mean excess on the others."""
    tried = [searched(search, results) for search in family]
    found: list[Result] = []
    for name in WORKLOADS:
        best = min(tried, key=lambda rows: fmean(min(excess, 2.0) for n, excess, _ in rows if n != name))
        found += [row for row in best if row[0] == name]
    return found


def summary(rows: Sequence[Result]) -> list[str]:
    excesses = sorted(excess for _, excess, _ in rows)
    costs = [cost for *_, cost in rows]
    near = sum(e <= 0.15 for e in excesses) / len(excesses)
    return [
        f"{median(excesses):+.1%}", f"{fmean(min(e, 2.0) for e in excesses):+.0%}", f"{excesses[-1]:+.0%}",
        f"{near:.0%}", f"{median(costs):.2f}", f"{max(costs):.2f}",
    ]  # fmt: skip


COLUMNS = ["pilots", "excess: median", "mean", "worst", "within 15 %", "cost: median", "at most"]
HEAD = f"""# Ways to choose a learning rate by short runs

    OMP_NUM_THREADS=1 python -m benchmarks.pilots

The way of `find_rate` was chosen here. {len(WORKLOADS)} trainings of 300 to 2000 steps with warm-up and cosine, two
seeds, one of the four language models; losses of short and whole trainings are in tables over the rate. *Excess* of the
validation loss over that of the best of rates half a decade apart, between quarter decades interpolated; in the mean
an excess of 200 % at most. *Cost* of the pilots in trainings, without the ramp. Searches begin at the best rate of a
fifth of the steps, and half a decade off. Pilots go through all of the data, if nothing else is said; those over a part
of it are run again over all where they learn nothing.

"""


def render(results: Row) -> str:
    """The page."""
    losses = results["losses"]
    fixed = [
        [name, *summary(searched(search, losses, "last" if "training data" in name else "loss"))]
        for name, search in FIXED.items()
    ]
    tuned = [[name, *summary(left_out(family, losses))] for name, family in FAMILIES.items()]
    return "\n".join(
        [
            HEAD + "## As they are\n",
            *table(COLUMNS, fixed),
            "\n## With a power of the length and a margin at cliffs that were chosen on the other trainings\n",
            *table(COLUMNS, tuned),
            "",
        ]
    )


def main() -> None:
    store = Store("pilots")
    for name, workload in WORKLOADS.items():
        for seed in range(1 if name in LANGUAGE else 2):
            store.add("losses", (name, seed), functools.partial(tabulated, workload, seed))
    store.write_page(render(store.results))


if __name__ == "__main__":
    main()
