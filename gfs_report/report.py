"""The report on a run: a verdict, the pictures, the numbers and the settings."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from gfs_core import ConfigError
from gfs_core.run.record import KEYS
from gfs_report import first
from gfs_report.page import Notes, Section, Table, write_page
from gfs_report.plots import BLUE, GREEN, ORANGE, PINK, RED, SKY, Line, Picture
from gfs_report.runs import Curve, Run, read_run
from gfs_report.verdict import Verdict, judge

Format = Literal["html", "png", "svg", "md", "json"]
FORMATS: tuple[Format, ...] = get_args(Format)
_ROWS = 40  # in the table of numbers
_LAYERS = 10  # in the table of shares
_WHERE = (
    "Share of the squared length of the top eigenvector that lies in each layer, at the last measurement; of the "
    "running estimate's direction where no eigenvector was solved for then. The ten largest."
)
_COLUMNS = {
    "loss_probe": "loss on the probe",
    "stability_ratio": "ratio",
    "running_stability_ratio": "running ratio",
    "sharpness": "sharpness",
    "preconditioned_sharpness": "preconditioned",
    "threshold": "threshold",
    "midpoint_sharpness": "midpoint",
    "gfs_sharpness": "GFS_k",
    "gfs_sharpness_full": "full GFS",
    "lr_effective": "rate used",
    "overhead": "overhead",
}


@dataclass(frozen=True)
class Report:
    """What a report shows, whatever its format."""

    title: str
    verdict: Verdict
    pictures: list[Picture]
    run: Run

    def sections(self) -> list[Section]:
        """Everything below the verdict, in order."""
        run = self.run
        out: list[Section] = [*self.pictures]
        if run.marks:
            words = [f"Step {m.step}, {m.word}: {m.reason}" for m in run.marks]
            out.append(Notes("Early warnings, and their reasons", words, [f"alarm-{i}" for i in range(len(words))]))
        for record in run.records:
            out += first.came_first(record)
        if run.reasons:
            counted = sorted(run.reasons.items(), key=lambda item: -item[1])
            out.append(Notes("What could not be had, and why", [f"{r} ({n} ×)" if n > 1 else r for r, n in counted]))
        if run.shares:
            largest = sorted(run.shares.items(), key=lambda item: -item[1])[:_LAYERS]
            shares = [[layer, f"{share:.1%}"] for layer, share in largest]
            out.append(Table("Where the curvature sits", _WHERE, ("layer", "share"), shares))
        head, rows = self.numbers()
        if rows:
            out.append(Table("The numbers", "At most forty steps, evenly spread.", head, rows))
        if run.settings:
            words = [f"{v:g}" if isinstance(v, float) else str(v) for v in run.settings.values()]
            pairs = [list(row) for row in zip(run.settings, words, strict=True)]
            out.append(Table("Settings", "As the run's history begins.", ("option", "value"), pairs))
        out.append(Notes("Read from", [*map(str, run.sources), *run.notes]))
        return out

    def numbers(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows of the table of numbers; empty where nothing was measured."""
        held = {key: name for key, name in _COLUMNS.items() if key in self.run.gfs}
        steps = np.unique(np.concatenate([self.run.gfs[key].steps for key in held])) if held else np.array([], np.int64)
        if len(steps) > _ROWS:
            steps = steps[np.linspace(0, len(steps) - 1, _ROWS).round().astype(int)]
        rows = [[str(s), *(_at(self.run.gfs[key], int(s)) for key in held)] for s in steps]
        return ["step", *held.values()], rows

    def summary(self) -> dict[str, Any]:
        """The report as plain values, for programs."""
        curves = {
            key: {
                "meaning": KEYS[key].help if key in KEYS else key,
                "points": len(c.values),
                "least": float(c.values.min()),
                "median": float(np.median(c.values)),
                "largest": float(c.values.max()),
                "last": c.last,
            }
            for key, c in self.run.gfs.items()
        }
        return {
            "title": self.title,
            "optimizer": self.run.optimizer,
            "part": self.run.part,
            "parts": self.run.parts,
            "verdict": self.verdict.to_dict(),
            "steps": self.run.steps,
            "values": curves,
            "curvature_shares": self.run.shares,
            "alarms": [m._asdict() for m in self.run.marks],
            "came_first": [first.summary(record) for record in self.run.records],
            "reasons": self.run.reasons,
            "settings": self.run.settings,
            "sources": [str(s) for s in self.run.sources],
            "notes": self.run.notes,
        }


def make_report(run: Run, loss_key: str | None = None, title: str | None = None) -> Report:
    """A report on what was read.

    Args:
        run: what was read.
        loss_key: the user's own key of the training loss, where it has to be told.
        title: heading; the run's name where it is not given.

    Raises:
        ConfigError: there is nothing under ``loss_key``.
    """
    place = Path(run.name).resolve()
    name = (place.parent if place.is_file() else place).name + (f", {run.optimizer}" if run.optimizer else "")
    name += f", part {run.part} of {run.parts}" if run.parts > 1 else ""
    return Report(title or f"Stability of {name}", judge(run, loss_key), pictures_of(run, loss_key), run)


def pictures_of(run: Run, loss_key: str | None = None) -> list[Picture]:
    """The pictures that the run has values for: loss, sharpness, ratio, rate, cost."""
    of = run.gfs.get
    key = run.loss_key(loss_key)
    kind = "Preconditioned sharpness" if "preconditioned_sharpness" in run.gfs else "Sharpness"
    used = of("lr_effective")
    pictures = [
        Picture(
            "Loss",
            "Logarithmic. Triangles are early warnings; a click on one leads to its reason.",
            "loss",
            _lines(
                (f"training loss ({key})", run.logged.get(key or ""), BLUE, "line"),
                ("training loss, as measured", run.training_loss, GREEN if key else BLUE, "line"),
                ("loss on the probe", of("loss_probe"), SKY, "line"),
            ),
            log=True,
            marks=run.marks,
        ),
        Picture(
            "Stability ratio",
            f"{kind} over the optimizer's threshold; 1 is the edge of stability. Solved for on the probe, as a running "
            "estimate over the training data, and with the noise of the batches (mean square).",
            "ratio",
            _lines(
                ("stability ratio", of("stability_ratio"), BLUE, "line"),
                ("running", of("running_stability_ratio"), SKY, "line"),
                ("mean square", of("mean_square_stability_ratio"), PINK, "line"),
                ("midpoint", of("midpoint_stability_ratio"), GREEN, "line"),
                ("GFS_k", of("gfs_stability_ratio"), ORANGE, "line"),
            ),
            edge=1.0,
            marks=run.marks,
        ),
        Picture(
            f"{kind} and the threshold",
            "Raw; without its swing, at the midpoint of the last three iterates or after a short stretch of gradient "
            "flow (GFS_k), neither of them the paper's quantity; at the end of gradient flow (full GFS, the paper's "
            "quantity); the optimizer's threshold dashed.",
            "sharpness",
            _lines(
                ("raw", of("preconditioned_sharpness", of("sharpness")), BLUE, "line"),
                ("running estimate", of("running_sharpness"), SKY, "line"),
                ("midpoint", of("midpoint_sharpness"), PINK, "line"),
                ("GFS_k (short horizon)", of("gfs_sharpness"), ORANGE, "line"),
                ("full GFS", of("gfs_sharpness_full"), GREEN, "points"),
                ("threshold", of("threshold"), RED, "dashed"),
            ),
        ),
        Picture(
            "Learning rate",
            "Asked for by the schedule, and used; the critical rate is where a step along the last one would stop "
            "lowering the loss.",
            "learning rate",
            _lines(
                ("asked for", _asked(run), BLUE, "dashed" if used is not None else "line"),
                ("used", used, ORANGE, "line"),
                ("critical", of("critical_lr"), RED, "line"),
            ),
        ),
        Picture(
            "What measuring took",
            "Fraction of the wall time since the start.",
            "overhead",
            _lines(("overhead", of("overhead"), BLUE, "line")),
        ),
        Picture(
            "Work of a measurement",
            "Gradients and Hessian-vector products, logarithmic; a product costs about two gradients.",
            "number",
            _lines(
                ("gradients", of("grad_evals"), BLUE, "line"),
                ("Hessian-vector products", of("hvps"), ORANGE, "line"),
            ),
            log=True,
        ),
    ]
    return [p for p in pictures if p.lines]


def write_report(report: Report, path: Path, kind: Format, refresh: int | None = None) -> None:
    """Write the report; whoever reads the file meanwhile sees the one before or this one, whole.

    Raises:
        OSError: ``path`` cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=f".{kind}")
    os.close(handle)
    whole = Path(name)
    try:
        if kind == "html":
            lead = report.verdict.sentences
            write_page(whole, title=report.title, lead=lead, sections=report.sections(), refresh=refresh)
        elif kind == "json":
            whole.write_text(json.dumps(report.summary(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        elif kind == "md":
            whole.write_text(markdown(report), encoding="utf-8")
        else:
            from gfs_report.still import write_still

            write_still(whole, f"{report.title}\n{report.verdict.summary}", report.pictures)
        whole.chmod(0o644)
        whole.replace(path)
    finally:
        whole.unlink(missing_ok=True)


def markdown(report: Report) -> str:
    """The report as text: verdict, warnings, numbers, settings."""
    out = [f"# {_plain(report.title)}", *map(_plain, report.verdict.sentences)]
    for section in report.sections():
        if isinstance(section, Notes):
            out += [f"## {section.heading}", "\n".join(f"- {_plain(item)}" for item in section.items)]
        elif isinstance(section, Table):
            rows = [section.head, ["---"] * len(section.head), *section.rows]
            table = "\n".join("| " + " | ".join(_plain(cell) for cell in row) + " |" for row in rows)
            out += [f"## {section.heading}", section.caption, table]
    return "\n\n".join(out) + "\n"


def watch(
    path: Path,
    optimizer: str | None,
    out: Path,
    *,
    every: int,
    part: int | None = None,
    loss_key: str | None = None,
    told: Callable[[Report], None] = lambda _: None,
) -> None:
    """Write the page again whenever the run's files have grown, until interrupted; then once more, at rest.

    Args:
        path: file or folder of the run, which need not be there yet.
        optimizer: which one, where there are several.
        out: the page.
        every: seconds between looks.
        part: which training of the history, from 1 on; ``None``: the latest.
        loss_key: the user's own key of the training loss, where it has to be told.
        told: called with each report.

    Raises:
        OSError: ``out`` cannot be written.
    """
    seen: Any = None
    report: Report | None = None
    try:
        while True:
            try:
                run = read_run(path, optimizer, part)
                now = [(s, s.stat().st_size, s.stat().st_mtime_ns) for s in run.sources]
                if now != seen:
                    seen, report = now, make_report(run, loss_key)
                    write_report(report, out, "html", refresh=every)
                    told(report)
            except ConfigError:  # nothing to read yet: training may still be loading its data
                pass
            time.sleep(every)
    except KeyboardInterrupt:
        if report is not None:
            write_report(report, out, "html")


def _asked(run: Run) -> Curve | None:
    """The rate that the schedule asks for."""
    used, scale = run.gfs.get("lr_effective"), run.gfs.get("lr_scale")
    if used is not None and scale is not None and len(used.steps) == len(scale.steps):
        return Curve(used.steps, used.values / np.where(scale.values > 0, scale.values, np.nan))
    logged = next((k for k in run.logged if k == "learning_rate" or k.startswith("lr-") or k in ("lr", "train/lr")), "")
    return run.gfs.get("learning_rate", run.logged.get(logged))


def _lines(*given: tuple[str, Curve | None, str, Any]) -> list[Line]:
    return [Line(name, curve, colour, form) for name, curve, colour, form in given if curve is not None]


def _at(curve: Curve, step: int) -> str:
    i = int(np.searchsorted(curve.steps, step))
    return f"{curve.values[i]:.4g}" if i < len(curve.steps) and curve.steps[i] == step else ""


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no table cell, no line of its own."""
    cleaned = " ".join(text.split())
    return "".join("\\" + c if c in r"\`*_[]|#" else c for c in cleaned).replace("<", "&lt;")


def format_of(out: Path) -> Format:
    """The format that the file's ending names.

    Raises:
        ConfigError: the ending names no format.
    """
    for kind in FORMATS:
        if out.suffix.lower() == f".{kind}":
            return kind
    raise ConfigError(f"`{out}` ends in no known format; let it end in .{', .'.join(FORMATS)}, or give --format")
