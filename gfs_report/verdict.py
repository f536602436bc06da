"""What a run's log says in a few sentences: what became of it, where it stood against the edge, what to do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from gfs_core.detectors.advice import WHAT_TO_DO
from gfs_report.losses import SMALL, Course, Fate, course_of
from gfs_report.ratios import PAST, at_its_end, has_room, in_mean_square, lower_rate, main_ratio, past
from gfs_report.runs import Mark, Run
from gfs_report.units import in_digits

Standing = Literal["unknown", "far", "near", "edge", "past"]
_EDGE = (0.85, PAST)
_FAR = 0.3
_NOW = "the steps are past their edge"
_THEN = "the steps were past their edge when that was last measured"
_ALARM = 2


@dataclass(frozen=True)
class Verdict:
    """A few sentences, the verdict first, and what they rest on.

    Attributes:
        fate: what became of the training loss.
        failed: whether the run is destroyed, as far as its loss tells.
        standing: of the ratio at the end of the run; unknown where none was measured there.
        course: the numbers of the loss.
        summary: what became of the run.
        where: the run against the edge.
        what: what happened besides; empty where nothing did.
        do: what to do.
    """

    fate: Fate
    failed: bool
    standing: Standing
    course: Course
    summary: str
    where: str
    what: str
    do: str

    @property
    def sentences(self) -> tuple[str, ...]:
        """In the order in which they are read."""
        return tuple(s for s in (self.summary, self.where, self.what, self.do) if s)

    def to_dict(self) -> dict[str, Any]:
        """The verdict as plain values; a number that is not known, or not finite, is absent."""
        course = {k: v for k, v in self.course._asdict().items() if not isinstance(v, float) or math.isfinite(v)}
        return {**vars(self), "course": {k: v for k, v in course.items() if v is not None}}


def judge(run: Run, loss_key: str | None = None) -> Verdict:
    """The verdict on a run.

    Args:
        run: what was logged.
        loss_key: the user's own key of the training loss, where it has to be told.

    Raises:
        ConfigError: there is nothing under ``loss_key``.
    """
    standing, where = _where(run)
    course = course_of(run, loss_key)
    losses = 0 if (loss := run.loss(loss_key)) is None else len(loss.steps)
    summary = _destroyed(course) if course.failed else _summary(run, course, losses, standing)
    do = _restart(run, course) if course.failed else _do(run, course, standing)
    return Verdict(course.fate, course.failed, standing, course, summary, where, _what(run), do)


def _destroyed(c: Course) -> str:
    """The first sentence on a destroyed run."""
    begun = f"it began at {c.start:.3g}"
    if c.fate == "not finite":
        return f"This run is destroyed: from step {c.since} on its loss was not finite."
    if c.fate == "blown up":
        return f"This run is destroyed: its loss blew up at step {c.since} and ended at {c.end:.3g}, where {begun}."
    if c.fate == "stuck":
        ended = f"its loss ended at {c.end:.3g}, where {begun}, and scatters more than it has fallen"
        if c.end > c.start:
            ended = f"its loss ended at {c.end:.3g}, above where {begun}"
        if abs(c.end - c.start) < SMALL * abs(c.start):
            ended = f"its loss ended at {c.end:.3g}, near where {begun}"
        return f"This run is destroyed: {ended}; its steps were past the edge when that was last measured."
    if c.fate == "worse":
        return f"This run is destroyed: its loss ended at {c.end:.3g}, far above its start: {begun}."
    lost = "all that it had gained" if c.lost >= 1 else f"{c.lost:.0%} of what it had gained"
    return (
        f"This run is destroyed: its loss ended at {c.end:.3g}, after a best of {c.best:.3g} at step {c.best_step}; "
        f"since about step {c.since} it has lost {lost} ({begun})."
    )


def _summary(run: Run, c: Course, losses: int, standing: Standing) -> str:
    """The first sentence on a run that is not destroyed, as far as its loss tells."""
    ends = f"from {c.start:.3g} to {c.end:.3g}"
    if c.fate == "unknown":
        few = f"of its training loss there is {'one value' if losses == 1 else f'no more than {losses} values'}"
        why = few if losses else "no loss was logged"
        if losses > 1:
            why += f", {ends}"
        if _ringing(run):
            return f"This run is in danger: its early warning is still on; what became of it is not known, for {why}."
        return f"What became of this run is not known: {why}."
    if c.fate == "flat":
        learnt = "nothing" if c.end > c.start else "next to nothing"
        scatters = ", and scatters more than that" if c.start - c.end >= SMALL * abs(c.start) else ""
        return f"This run has learnt {learnt}: its loss went {ends}{scatters}."
    if c.fate == "drifted":
        return (
            f"The loss of this run drifted: it ended at {c.end:.3g}, after a best of {c.best:.3g} at step "
            f"{c.best_step} (it began at {c.start:.3g})."
        )
    if _ringing(run):
        return f"The loss of this run went {ends}, but its early warning is still on."
    if past(run):
        are = "are" if _is_past_now(run, standing) else "were, when last measured,"
        return f"The loss of this run went {ends}, but its steps {are} past the edge."
    if c.fate == "shaken":
        return f"The loss of this run went {ends}, but it blew up first, about step {c.since}."
    if c.fate == "stalled":
        return f"The loss of this run went {ends}, but it has hardly fallen since about step {c.since}."
    if c.fate == "recovered":
        return (
            f"This run recovered: its loss went {ends}, though much of that was lost for a while about step {c.since}."
        )
    if c.start - c.end < SMALL * abs(c.start):
        return f"The loss of this run fell by {(c.start - c.end) / abs(c.start):.0%}: it went {ends}."
    came_back = ", and it came back from its early warnings" if _alarms(run) else ""
    return f"This run went well: its loss went {ends}{came_back}."


def _where(run: Run) -> tuple[Standing, str]:
    found = main_ratio(run)
    if run.second_data:
        return "unknown", (
            "Where the run stood against the edge of stability is not known: the curvature is that of a second data "
            "set, and not of the data that was trained on."
        )
    if found is None:
        return "unknown", (
            "Where the run stood against the edge of stability is not known: no stability ratio was logged."
        )
    ratio = found.curve
    past = float((ratio.values >= 1).mean())
    measured = f"{len(ratio.values)} measurements" if len(ratio.values) > 1 else "one measurement"
    whole = f"over the whole run it lay between {in_digits(ratio.values.min())} and {in_digits(ratio.values.max())}"
    whole += f", past 1 in {_percent(past)} of {measured}" if past else f", never past 1 in {measured}"
    if not found.lately:
        return "unknown", (
            f"Where the run stood at its end is not known: its {found.name} was last measured at step "
            f"{ratio.steps[-1]} of {run.steps[1]}, and was {in_digits(ratio.last)} then, where 1 is the edge."
        )
    now, count = at_its_end(ratio)
    standing: Standing = "far" if now < _FAR else "near" if now < _EDGE[0] else "edge" if now <= _EDGE[1] else "past"
    place = {
        "far": "far below the edge of stability",
        "near": "below the edge of stability",
        "edge": "at the edge of stability",
        "past": "past the edge of stability",
    }[standing]
    when = "over the last steps" if count > 1 else f"when last measured, at step {ratio.steps[-1]}"
    now_at = f"its {found.name} was {in_digits(now)} {when}, where 1 is the edge"
    return standing, f"The run ended {place}: {now_at}; {whole}.{_noise(run, standing)}"


def _noise(run: Run, standing: Standing) -> str:
    """What is said of the ratio in the mean square, where it and the plain one lie on two sides of the edge."""
    noisy = in_mean_square(run) if standing in ("far", "near") else None
    if noisy is None or noisy[0] <= 1:
        return ""
    return (
        f" With the noise of the batches counted (in the mean square) it was {in_digits(noisy[0])}, by {noisy[1]} "
        "measurements; that is above 1 in healthy runs too, so no verdict rests on it."
    )


def _what(run: Run) -> str:
    parts = []
    alarms = _alarms(run)
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
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _restart(run: Run, c: Course) -> str:
    """What to do about a destroyed run. No rate is named: what was measured of it is of its broken state."""
    since = c.since if c.since is not None else run.steps[0]
    warned = max((m.step for m in _alarms(run) if m.step <= since), default=None)
    learnt = c.fate == "lost" or (c.fate == "not finite" and c.best < c.start)
    if learnt:
        when = f"step {warned}, where the alarm came," if warned is not None else f"step {since}"
        text = f'Start again from a checkpoint before {when} with control="cap", or with a lower learning rate'
    else:
        text = 'Start again with a lower learning rate, or with control="cap"'
    text += '; alarm="stop" saves a checkpoint and ends such a run while its weights are still good.'
    if c.fate == "lost":
        text += " Only where the data or the loss were made harder at that step on purpose is this no fault."
    return text


def _do(run: Run, c: Course, standing: Standing) -> str:
    ringing = _ringing(run)
    if past(run):
        found = lower_rate(run)
        less, unknown = "", ""
        if found.rate is None:
            unknown = f" To which rate is not known: {found.why_not}."
        else:
            by = f"by {found.measurements} measurements of the {found.name}"
            less = f", to about {found.rate:.2g} ({found.low:.2g} to {found.high:.2g}, {by})"
        why = _NOW if _is_past_now(run, standing) else _THEN
        return f'Lower the learning rate{less}, or let control="cap" do it: {why}.{unknown}'
    if ringing:
        return (
            'Do not raise the learning rate, for the alarm is still on: watch the next steps, or let control="cap" '
            "hold the rate."
        )
    if c.fate == "flat":
        return (
            "A rate that is far too low, a network whose units are dead and targets that do not go with their inputs "
            "look alike here: look at the norm of the gradient and at the data before the rate is changed."
        )
    if c.fate == "drifted":
        return (
            "A loss that is meant to fall should not rise: look at what changed in the rate, the data or the "
            "regularisation. Of a loss that rises in good runs too, as with adversaries or rewards, this is no fault."
        )
    if c.fate == "shaken":
        return (
            "Try a lower learning rate, or a warm-up, and compare the ends: what blows up at first may stay behind for "
            "good (`gfs pilot` trains both)."
        )
    if c.fate == "stalled":
        return (
            "Hold the end against the loss of the best constant answer: a loss that stops so early is at its floor, or "
            "the network tells its inputs no longer apart."
        )
    if standing == "unknown":
        if run.second_data:
            return 'To see how near to instability a run is, measure the data that it trains on: probe="batch".'
        if not any("stability_ratio" in key for key in run.gfs):
            return "Add GFSCallback to the run: without its values only the loss can be shown."
        return (
            "Nothing follows from what was measured: a larger `max_overhead`, or a smaller `every`, would tell where "
            "the run stands at its end."
        )
    if c.fate == "unknown":
        return "Log the training loss, or name its key with --loss: the ratio alone does not tell how a run went."
    came = "the run came back from its alarms by itself, and " if _alarms(run) else ""
    if standing == "edge":
        return (
            f"Nothing has to be done: {came}training at the edge is how gradient descent works, with a loss that "
            'swings. Do not raise the rate; for a margin below the edge, control="cap".'
        )
    if standing == "far" and c.fate == "fell" and not _alarms(run) and has_room(run):
        return (
            "Nothing has to be done for stability. The learning rate may be lower than it need be: whether a higher "
            "one trains better a pilot run can show (`gfs pilot`)."
        )
    return "Nothing has to be done; keep the early warning on."


def _is_past_now(run: Run, standing: Standing) -> bool:
    """Whether several measurements at the end of the run say that it is past the edge."""
    found = main_ratio(run)
    return standing == "past" and found is not None and at_its_end(found.curve)[1] > 1


def _alarms(run: Run) -> list[Mark]:
    return [m for m in run.marks if m.state == _ALARM]


def _ringing(run: Run) -> bool:
    """Whether the alarm was still on at the end."""
    now = run.gfs.get("alarm")
    return now is not None and now.last >= _ALARM


def _percent(fraction: float) -> str:
    return f"{fraction:.0%}" if fraction >= 0.01 else f"{fraction:.1%}"


def _phrase(reason: str) -> str:
    return reason.partition(WHAT_TO_DO)[0].rstrip(".") or "the reason was not kept"
