"""What `gfs pilot` and `gfs doctor` print."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from gfs_report.advice import Advice
from gfs_report.doctor import Examination, Installed
from gfs_report.rate.search import FoundForJob
from gfs_report.trial.checks import band
from gfs_report.trial.pilot import Pilot
from gfs_report.units import count, duration, size


class Steps:
    """A line of progress for each run."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self.progress, self.steps = progress, steps
        self._tasks: dict[str, object] = {}

    def __call__(self, name: str, step: int, of: int | None = None) -> None:
        """Take in that the run of this name has taken ``step`` steps, of at most ``of``."""
        if name not in self._tasks:
            self._tasks[name] = self.progress.add_task(name, total=of or self.steps)
        self.progress.update(self._tasks[name], completed=step)  # type: ignore[arg-type]


@contextmanager
def progress(console: Console, steps: int) -> Iterator[Steps]:
    """Progress of runs of ``steps`` optimizer steps."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("step {task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as shown:
        yield Steps(shown, steps)


def show_pilot(found: Pilot, console: Console) -> None:
    """The verdict, and a line for each rate."""
    table = Table("rate", "steps", "loss", "edge", "ratio", "harm", title="What the runs did")
    for r in found.rates:
        loss = "" if r.loss is None else f"{r.loss[0]:.3g} → {r.loss[1]:.3g}"
        edge = "" if r.edge is None else r.edge.standing
        ratio = "" if r.edge is None or r.edge.band is None else band(r.edge.band)
        hurt = "" if r.harm is None else f"{r.harm.kind}, step {r.harm.step}"
        table.add_row(f"×{r.factor:g}", str(r.steps), loss, edge, ratio, hurt or r.problem)
    console.print(table)
    for sentence in found.lead:
        console.print(Text(sentence))


def show_rate(found: FoundForJob, console: Console) -> None:
    """The rate with its range, the pilots, and what is not known."""
    table = Table("rate", "steps", "loss", title="The pilots")
    for p in found.rate.pilots:
        table.add_row(f"{p.rate:.3g}", f"{p.taken} of {p.steps}", "lost" if not p.losses else f"{p.loss:.4g}")
    console.print(table)
    for sentence in (*found.lead, *found.rate.unsure):
        console.print(Text(sentence))


def show_examination(found: Examination, console: Console) -> None:
    """What was found, the prices, and what to set."""
    facts = found.facts
    table = Table(show_header=False, box=None, padding=(0, 1))
    weights = f"{facts.get('measured', 0):,} measured, {facts.get('frozen', 0):,} frozen, {facts.get('tied', 0)} tied"
    rows = [
        ("model", f"{facts.get('model', '?')} on {facts.get('device', '?')}, by {facts.get('framework', '?')}"),
        ("weights", f"{weights} (tensors at a second place)"),
        ("products", found.products),
        ("precision", found.precision),
        ("threshold", found.threshold),
        ("memory", found.memory),
        ("a step", "not known" if found.step is None else f"{duration(found.step)} without measuring"),
    ]
    rows += [(key.replace("_", " "), f"{value:.4g}") for key, value in found.values.items()]
    for name, text in rows:
        table.add_row(Text(name, style="bold"), Text(text))
    console.print(table)
    if found.prices:
        prices = Table(
            Column("tier", no_wrap=True),
            "a measurement",
            "in training steps",
            "every, for 5 %",
            "vectors",
            title="Prices",
        )
        for p in found.prices:
            memory = "" if p.memory is None else size(p.memory)
            prices.add_row(p.tier, duration(p.seconds), count(p.steps), str(p.every), memory)
        console.print(prices)
    for problem in found.problems:
        console.print(Text(f"• {problem}"))
    if found.measurable:
        console.print(Text("This job can be measured."))
    else:
        console.print(Text("This job cannot be measured: no stability ratio was had."))
    if found.advice is not None:
        show_advice(found.advice, console)


def show_advice(advice: Advice, console: Console) -> None:
    """What to set, in three ways, and why."""
    for reason in advice.reasons:
        console.print(Text(reason))
    console.print(Text(f"\nPython:  {advice.python}\nflags:   {advice.flags}\nYAML:\n{advice.yaml}"))


def show_installed(packages: Sequence[Installed], accelerators: Sequence[str], console: Console) -> None:
    """Versions, and what is missing."""
    table = Table("package", "installed", "wanted")
    for p in packages:
        table.add_row(p.name, Text(p.version or "–"), Text(p.wanted, style="" if p.enough else "bold red"))
    console.print(table)
    console.print(Text(f"accelerators: {', '.join(accelerators) or 'none'}"))
    old = [f"'{p.name}{p.wanted}'" for p in packages if not p.enough]
    if old:
        console.print(Text(f"Too old: pip install -U {' '.join(old)}"))
    names = {p.name: p.version for p in packages}
    if not names.get("lightning") and not names.get("pytorch-lightning"):
        console.print(Text("Without Lightning there is no lightning_gfs: pip install 'gfs-sharpness[lightning]'"))
    if not names.get("transformers"):
        console.print(Text("Without transformers there is no hf_gfs: pip install 'gfs-sharpness[hf]'"))
