"""What a run's log says, in three sentences: where the run stood against the edge, what happened, what to do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gfs_report.losses import diverged, start_of
from gfs_report.runs import Curve, Run
from gfs_report.units import in_digits

Standing = Literal["unknown", "far", "near", "edge", "past"]
_EDGE = (0.85, 1.15)  # of the ratio: with full batches its median stays within 0.9–1.1 (benchmarks/edge.md)
_FAR = 0.3
_WORSE = 0.1  # of the loss of the start above it: more than mini-batches scatter
_START = 0.02  # the first part of the steps
_END = 0.1  # the last part of the steps, which counts as now
_RATIOS = {  # the best one that was logged is the one to judge by
    "stability_ratio": "stability ratio",
    "running_stability_ratio": "running stability ratio",
    "gfs_stability_ratio": "GFS_k stability ratio",
}


@dataclass(frozen=True)
class Verdict:
    """Three sentences, and what they rest on.

    Attributes:
        standing: of the ratio at the end of the run; unknown where none was logged.
        diverged: whether the training loss ended non-finite, or above where it began.
        where: the run against the edge.
        what: what happened.
        do: what to do.
    """

    standing: Standing
    diverged: bool
    where: str
    what: str
    do: str

    @property
    def sentences(self) -> tuple[str, str, str]:
        """In the order in which they are read."""
        return self.where, self.what, self.do


def judge(run: Run, loss_key: str | None = None) -> Verdict:
    """The verdict on a run.

    Args:
        run: what was logged.
        loss_key: the user's own key of the training loss, where it has to be told.

    Raises:
        ConfigError: there is nothing under ``loss_key``.
    """
    standing, where = _where(run)
    loss = run.loss(loss_key)
    bad = loss is not None and diverged(run, loss, _worse_than(loss.head(_START)))
    return Verdict(standing, bad, where, _what(run, loss, bad), _do(run, standing, bad))


def main_ratio(run: Run) -> tuple[str, Curve] | None:
    """The stability ratio to judge by, with its name in words."""
    return next(((name, run.gfs[key]) for key, name in _RATIOS.items() if key in run.gfs), None)


def _where(run: Run) -> tuple[Standing, str]:
    found = main_ratio(run)
    if found is None:
        return "unknown", (
            "Where the run stood against the edge of stability is not known: no stability ratio was logged."
        )
    name, ratio = found
    end = ratio.tail(_END)
    now = float(np.median(end))
    standing: Standing = "far" if now < _FAR else "near" if now < _EDGE[0] else "edge" if now <= _EDGE[1] else "past"
    place = {
        "far": "far below the edge of stability",
        "near": "below the edge of stability",
        "edge": "at the edge of stability",
        "past": "past the edge of stability",
    }[standing]
    past = float((ratio.values >= 1).mean())
    measured = f"{len(ratio.values)} measurements" if len(ratio.values) > 1 else "one measurement"
    whole = f"over the whole run it lay between {in_digits(ratio.values.min())} and {in_digits(ratio.values.max())}"
    whole += f", past 1 in {_percent(past)} of {measured}" if past else f", never past 1 in {measured}"
    now_at = f"its {name} was {in_digits(now)} over the last steps, where 1 is the edge"
    return standing, f"The run ended {place}: {now_at}; {whole}."


def _what(run: Run, loss: Curve | None, bad: bool) -> str:
    parts = []
    ends = (0.0, 0.0) if loss is None else (_median(loss.head(_START)), _median(loss.tail(_END)))
    if loss is None:
        parts.append("no loss was logged")
    elif bad and not math.isfinite(loss.last):
        since = int(loss.steps[~np.isfinite(loss.values)][0])
        parts.append(f"the loss stopped being finite at step {since}")
    elif bad:
        parts.append(f"the loss ended at {ends[1]:.3g}, above the {ends[0]:.3g} of its start")
    else:
        parts.append(f"the loss went from {ends[0]:.3g} to {ends[1]:.3g}")
    alarms = [m for m in run.marks if m.state == 2]
    if alarms:
        more = "" if len(alarms) == 1 else f" and {len(alarms) - 1} more later"
        parts.append(f"the early warning raised an alarm at step {alarms[0].step}{more}: {_phrase(alarms[0].reason)}")
    elif run.marks:
        times = "once" if len(run.marks) == 1 else f"{len(run.marks)} times"
        parts.append(f"the early warning watched {times}, without an alarm")
    elif "alarm" in run.gfs:
        parts.append("the early warning stayed quiet")
    scale = run.gfs.get("lr_scale")
    if scale is not None and scale.values.min() < 0.999:
        parts.append(f"the control held the learning rate down to {scale.values.min():.2g} of what the schedule asked")
    full = run.gfs.get("gfs_sharpness_full")
    if full is not None and len(full.values) > 1:
        parts.append(f"the full GFS sharpness went from {full.values[0]:.3g} to {full.last:.3g}")
    text = "; ".join(parts)
    return text[0].upper() + text[1:] + "."


def _do(run: Run, standing: Standing, bad: bool) -> str:
    found = main_ratio(run)
    rate = run.gfs.get("lr_effective") or run.gfs.get("learning_rate")
    last = [m for m in run.marks if m.state == 2]
    now = run.gfs.get("alarm")
    noisy = run.gfs.get("mean_square_stability_ratio")
    past = noisy is not None and _median(noisy.tail(_END)) > 1
    if standing == "unknown":
        return "Add GFSCallback to the run: without its values only the loss can be shown."
    if bad:
        when = f"before step {last[0].step}, where the alarm came," if last else "before the loss rose"
        return (
            f'Start again from a checkpoint {when} with control="cap", or with a lower learning rate; alarm="stop" '
            "with alarm_checkpoint=True ends such a run while its weights are still good."
        )
    ringing = now is not None and now.last >= 2
    if ringing or past or standing == "past":
        why = "the alarm is still on" if ringing else "the steps are past their edge"
        less = ""
        if found is not None and rate is not None:
            allowed = 0.5 / max(_median(found[1].tail(_END)), _median(noisy.tail(_END)) if noisy is not None else 0.0)
            less = f", to about {rate.last * min(allowed, 1):.2g}" if allowed < 1 else ""
        return f'Lower the learning rate{less}, or let control="cap" do it: {why}.'
    if standing == "edge":
        came = "the run came back from its alarms by itself, and " if last else ""
        return (
            f"Nothing has to be done: {came}training at the edge is how gradient descent works, with a loss that "
            'swings. Do not raise the rate; for a margin below the edge, control="cap".'
        )
    if standing == "far":
        return (
            "Nothing has to be done for stability. The learning rate may be lower than it need be: whether a higher "
            "one trains better a pilot run can show (`gfs pilot`)."
        )
    return "Nothing has to be done; keep the early warning on."


def _worse_than(first: NDArray[np.float64]) -> float:
    """A loss above this is worse than the start: of one run a few losses, maybe one, have to tell how they scatter."""
    return start_of(first) + _WORSE * abs(_median(first))


def _median(values: NDArray[np.float64]) -> float:
    return float(np.median(values))


def _percent(fraction: float) -> str:
    return f"{fraction:.0%}" if fraction >= 0.01 else f"{fraction:.1%}"


def _phrase(reason: str) -> str:
    return reason.rstrip(".") or "the reason was not kept"
