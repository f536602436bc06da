"""The questions that a pilot puts to its runs and the thresholds of an answer; what to set; what is not proved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from gfs_core.actions.rate import PROFILE
from gfs_report.advice import Advice, advise
from gfs_report.losses import count_spikes
from gfs_report.runs import Run
from gfs_report.trial import evidence
from gfs_report.trial.evidence import Agreement, Edge, Harm, Interval, Price, Steadiness
from gfs_report.units import in_digits

# Measurements without a budget: the evidence is to be complete. Each interval is a multiple of the one before, so that
# the price of each tier can be told from the seconds of the steps.
CADENCE = {"running": 5, "sharpness": 10, "gfs": 20}
FEWEST_STEPS = 2 * CADENCE["gfs"]
HAD = 0.8  # fraction of the solved ratios due that has to be had: with fewer an alarm is late and a control starves
TRACKS = 0.5  # rank correlation from which the running estimate follows: on tasks with a schedule it was 0.82 to 0.97
# Running / solved ratio on one batch. The running one is 0.68 to 1.16 of the exact one, a solved one on a whole batch
# 1.0 to 1.7 of it (benchmarks/tiers.md): 0.4 to 1.16 together, and some room on either side.
QUOTIENT = (0.3, 1.5)
STILL = 1.5  # largest / smallest solved ratio below which there is nothing to follow
DISTANT = 0.3  # ratios: below it neither an alarm nor a control asks for more than that it is small
STEADIER = 0.9  # swing of GFS_k over that of the raw sharpness below which the flow is worth its price
_LOWER = 0.8  # of the ratio before a harm: the margin advised then …
_SPOKE = 0.2  # … where that ratio is not so small that no margin would have helped

MEASURED = "Can the stability ratio be measured?"
EDGE = "Is 1 the edge of this job?"
TOLD = "Was harm told of before it came?"
FOLLOWED = "Does the running estimate follow the solved ratio?"
_HARMED = {
    "not finite": "stopped being finite",
    "doubled": "doubled for good",
    "worse": "rose above its start",
    "lost": "lost what it had gained",
    "blown up": "blew up and ended where it began",
    "behind": "was left far behind that of a lower rate, as seen",
}
_BEHIND = 0.5  # of what a lower rate gained in loss: a rate that gained less is no faster, it is worse


@dataclass(frozen=True)
class Rate:
    """The run at one factor on the user's rates.

    Attributes:
        factor: on every rate that the job uses.
        ended: ``steps``, after those asked for; ``itself``, earlier; ``diverged``; ``error``.
        steps: optimizer steps taken.
        loss: the first, and the median of the last part; ``None``: not known.
        rates: learning rate at the first and the last step.
        had: fraction of the solved ratios due that were had.
        edge: where it stood.
        harm: what went wrong.
        spikes: how often the loss rose far above its latest values; ``None``: not known.
        alarms: early warnings that reached *alarm*.
        agreement: of the running with the solved ratio.
        steadiness: of the raw sharpness, and of GFS_k at the same steps.
        price: what measuring took.
        past_margin: fraction of the measurements at which the default margin was passed.
        problem: what the job failed with; empty where it did not.
        reasons: why values could not be had, the most frequent first.
    """

    factor: float
    ended: str
    steps: int
    loss: tuple[float, float] | None = None
    rates: tuple[float, float] | None = None
    had: float = 0.0
    edge: Edge | None = None
    harm: Harm | None = None
    spikes: int | None = None
    alarms: int = 0
    agreement: Agreement | None = None
    steadiness: tuple[Steadiness, Steadiness] | None = None
    price: Price | None = None
    past_margin: float | None = None
    problem: str = ""
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Check:
    """One question to the signals, the answer, and the evidence in a sentence."""

    question: str
    answer: Literal["yes", "no", "not told"]
    evidence: str


def rate_of_run(factor: float, ended: str, run: Run | None, facts: dict[str, Any], problem: str = "") -> Rate:
    """The numbers of one run.

    Args:
        factor: on the user's rates.
        ended: how it ended.
        run: what was logged; ``None``: nothing.
        facts: of the job.
        problem: what it failed with.
    """
    if run is None or "seconds" not in run.logged:
        return Rate(factor, ended, 0, problem=problem)
    steps = int(run.logged["seconds"].steps[-1]) + 1
    loss = run.logged.get("train_loss", run.gfs.get("loss_probe"))
    adaptive, whole = bool(facts.get("adaptive")), full_batch(facts)
    start, late = evidence.settled(steps, slow=adaptive), evidence.settled(steps, slow=True)
    ratio = evidence.main_ratio(run, whole)
    hurt = None if loss is None else evidence.harm(run, loss)
    solved, running = run.gfs.get("stability_ratio"), run.gfs.get("running_stability_ratio")
    every = CADENCE["gfs" if facts.get("empirical") else "sharpness"]
    due = len(range(every, steps, every))  # at step 0 adaptive optimizers have no threshold yet
    used = run.logged.get("learning_rate")
    noisy = run.gfs.get("mean_square_stability_ratio")
    return Rate(
        factor,
        ended,
        steps,
        loss=None if loss is None else (float(loss.values[0]), float(np.median(loss.tail(0.1)))),
        rates=None if used is None else (float(used.values[0]), used.last),
        had=0.0 if solved is None or not due else min(1.0, int((solved.steps > 0).sum()) / due),
        edge=None if ratio is None else evidence.edge(ratio, hurt is not None, start if whole else late),
        harm=hurt,
        spikes=None if loss is None else count_spikes(loss.values),
        alarms=sum(m.state == 2 for m in run.marks),
        agreement=None if solved is None or running is None else evidence.agreement(running, solved, late),
        steadiness=evidence.steadier(run, start),
        price=evidence.price(run, CADENCE),
        past_margin=None
        if noisy is None or noisy.steps[-1] < start
        else float((noisy.values[noisy.steps >= start] > PROFILE.margin_of(adaptive)).mean()),
        problem=problem,
        reasons=tuple(sorted(run.reasons, key=lambda r: -run.reasons[r])),
    )


def held_against_lower(rates: Sequence[Rate], runs: Mapping[float, Run]) -> list[Rate]:
    """The runs, and as a harm where one gained less than half of what a run at a lower rate did.

    Such a loss need not have risen: steps far past the edge can end at chance, or stay near it, from the start.

    Args:
        rates: by factor, the lowest first.
        runs: what was logged, by factor.
    """
    out: list[Rate] = []
    for rate in rates:
        lower = [r.loss[0] - r.loss[1] for r in out if r.harm is None and r.loss is not None]
        lasted = rate.harm is None and rate.loss is not None and rate.ended in ("steps", "itself")
        if lasted and lower and rate.loss is not None and rate.loss[0] - rate.loss[1] < _BEHIND * max(lower):
            last = rate.steps - 1
            told = next((m.step for m in runs[rate.factor].marks if m.state > 0), None)
            largest = None if rate.edge is None else rate.edge.largest
            rate = replace(rate, harm=Harm(last, "behind", None if told is None else last - told, largest))
        out.append(rate)
    return out


def full_batch(facts: dict[str, Any]) -> bool:
    """Whether every step is on all the data."""
    return 0 < int(facts.get("batches_per_epoch") or 0) <= int(facts.get("accumulation", 1))


def nearest(rates: Sequence[Rate]) -> Rate:
    """The run at the user's own rate, or the one next to it."""
    return min(rates, key=lambda r: abs(np.log(r.factor)))


def ask(rates: Sequence[Rate], facts: dict[str, Any]) -> list[Check]:
    """All questions, answered."""
    return [_measured(rates, facts), _edge(rates), _told(rates), _followed(rates, facts)]


def _measured(rates: Sequence[Rate], facts: dict[str, Any]) -> Check:
    lasting = [r for r in rates if r.ended in ("steps", "itself")] or rates
    worst = min(lasting, key=lambda r: r.had)
    text = f"{worst.had:.0%} of the ratios due were had at ×{worst.factor:g}"
    if worst.had >= HAD:
        return Check(MEASURED, "yes", "All ratios due were had." if worst.had == 1 else f"At the least, {text}.")
    if worst.steps < FEWEST_STEPS:
        return Check(MEASURED, "no", f"The job ended by itself after {worst.steps} steps, too soon to measure.")
    why = "; ".join(worst.reasons[:2]) or facts.get("no_threshold") or "the reason is in the run's output.txt"
    return Check(MEASURED, "no", f"Only {text}: {why}.")


def _edge(rates: Sequence[Rate]) -> Check:
    parts, wrong, told = [], False, False
    for r in rates:
        if r.edge is None:
            continue
        at, e = f"at ×{r.factor:g} the ratio", r.edge
        if e.band is None:
            parts.append(f"{at} stayed below the edge ({in_digits(e.largest)} at most)")
        elif r.harm is not None or r.ended == "diverged":
            told = True
            parts.append(f"{at} passed {evidence.NEAR} from step {e.reached} on, and the run was harmed")
        elif e.standing == "past":
            wrong = True
            parts.append(f"{at} lay at {band(e.band)}, and the loss fell as it should")
        else:
            told = told or e.standing == "held"
            what = "held it" if e.standing == "held" else "fell back"
            parts.append(f"{at} reached the edge at step {e.reached} and {what}: {band(e.band)}")
    if not parts:
        return Check(EDGE, "not told", "Too few ratios were had to tell.")
    if wrong:
        parts.append("1 is not the edge here: gradients that are clipped, or small batches, do that")
    elif not told:
        parts.append("a larger factor in --rates, or more steps, may lead there")
    return Check(EDGE, "no" if wrong else "yes" if told else "not told", _sentence(parts))


def _told(rates: Sequence[Rate]) -> Check:
    parts, missed = [], False
    for r in rates:
        if r.harm is None:
            continue
        text = f"at ×{r.factor:g} the loss {_HARMED[r.harm.kind]} at step {r.harm.step}"
        if r.harm.alarm_lead is not None:
            text += f", and the early warning came {r.harm.alarm_lead} steps before"
        elif r.harm.ratio_before is not None and r.harm.ratio_before >= evidence.NEAR:
            text += f", without an early warning, but with a ratio of {in_digits(r.harm.ratio_before)} before it"
        else:
            text, missed = f"{text}, and nothing told of it", True
        parts.append(text)
    failed = [f"at ×{r.factor:g} the job failed: {r.problem}" for r in rates if r.ended == "error"]
    spiked = [
        f"at ×{r.factor:g} the loss spiked {_times(r.spikes)} and came back by itself"
        for r in rates
        if r.spikes and r.harm is None
    ]
    if not parts:
        nothing = "no run was harmed, so there was nothing to tell of"
        return Check(TOLD, "not told", _sentence([*(failed or [nothing]), *spiked]))
    return Check(TOLD, "no" if missed else "yes", _sentence([*parts, *failed, *spiked]))


def _followed(rates: Sequence[Rate], facts: dict[str, Any]) -> Check:
    usable = [r for r in rates if r.agreement is not None]
    if not usable:
        why = "the threshold of this optimizer is not known" if facts.get("empirical") else "there are too few pairs"
        return Check(FOLLOWED, "not told", _sentence([why]))
    own = nearest(usable)
    found = own.agreement
    assert found is not None
    text = (
        f"at ×{own.factor:g}, over {found.pairs} pairs, the rank correlation is {interval(found.correlation)} and "
        f"running / solved {interval(found.quotient)} in the median"
    )
    quotient, correlation, still = found.quotient, found.correlation, found.spread < STILL
    if found.largest < DISTANT:
        why = f"both stayed below {found.largest:.2g}, so far from the edge that a factor between them does not matter"
        return Check(FOLLOWED, "not told", _sentence([text, why]))
    if quotient.high < QUOTIENT[0] or quotient.low > QUOTIENT[1]:
        return Check(FOLLOWED, "no", _sentence([text, "that is too far off"]))
    if correlation.high < TRACKS and not still:
        return Check(FOLLOWED, "no", _sentence([text, "it does not follow"]))
    if not QUOTIENT[0] <= quotient.value <= QUOTIENT[1] or (correlation.value < TRACKS and not still):
        return Check(FOLLOWED, "not told", _sentence([text, "the intervals are too wide to tell"]))
    little = ["the ratio hardly moved, so there was little to follow"] if still else []
    return Check(FOLLOWED, "yes", _sentence([text, *little]))


def what_to_set(rates: Sequence[Rate], checks: Sequence[Check], facts: dict[str, Any]) -> Advice | None:
    """Tier and intervals; ``None`` where nothing could be measured, or no price be told."""
    own = nearest(rates)
    if own.price is None or any(c.question == MEASURED and c.answer == "no" for c in checks):
        return None
    prices = own.price.measurement()
    clock = facts.get("measuring", {}).get("prices", {})
    if "directional" in clock:
        prices["directional"] = clock["directional"] + clock.get("", 0.0)
    flow = ""
    if own.steadiness is None:
        flow = "the short-horizon GFS sharpness was not had often enough to judge it"
    else:
        raw, gfs = own.steadiness
        if gfs.swing > STEADIER * raw.swing:
            flow = f"GFS_k swings by {gfs.swing:.0%} between measurements, the raw sharpness by {raw.swing:.0%}"
    off = any(c.question == FOLLOWED and c.answer == "no" for c in checks)
    running = "it does not follow the solved ratio here" if off else ""
    return advise(own.price.step, prices, flow=flow, running=running, empirical=bool(facts.get("empirical")))


def margin(rates: Sequence[Rate], facts: dict[str, Any]) -> tuple[float, str] | None:
    """Stability ratio for a control to keep below, and why; ``None`` where the threshold is not known."""
    if facts.get("empirical"):
        return None
    default, own = PROFILE.margin_of(bool(facts.get("adaptive"))), nearest(rates)
    before = [r.harm.ratio_before for r in rates if r.harm is not None and r.harm.ratio_before is not None]
    low = min(before, default=default / _LOWER)
    value, why = default, "the default: no run was harmed below it"
    if low < _SPOKE:
        why = f"the default; a run was harmed at a ratio of {in_digits(low)}, against which no margin helps"
    elif _LOWER * low < default:
        value, why = round(_LOWER * low, 2), f"because a run was harmed at a ratio of {in_digits(low)}"
    if own.past_margin is not None:
        acts = f"`cap` would have acted at {own.past_margin:.0%} of the measurements at ×{own.factor:g}"
        why += f"; with the default, {acts}"
    return value, why


def limits(rates: Sequence[Rate], facts: dict[str, Any], steps: int) -> list[str]:
    """What is not proved for this loss, and what these runs could not see."""
    own = nearest(rates)
    out = [
        "That GFS sharpness falls along gradient descent is a theorem for scalar networks with squared loss and full "
        "batches (Kreisler et al. 2023), and about the full gradient flow solution. It does not cover this model: here "
        "everything is measurement.",
        "GFS_k, the short-horizon value, is the raw sharpness with its swing taken out. It is not the quantity of the "
        "theorem, nor is it proved to fall.",
        "The threshold is exact on a quadratic, with the optimizer's present state. A real loss is none: 1 is where "
        "oscillation begins, not where a run diverges.",
        f"These were the first {own.steps} steps of the job, with one seed. What comes later was not seen.",
    ]
    if not full_batch(facts):
        out.append(
            "With mini-batches training settles at a ratio below 1, lower the smaller the batch, and by far lower with "
            "momentum or Adam: a ratio far below 1 does not mean that the rate may be raised."
        )
    if facts.get("clipping"):
        out.append(
            "The job clips its gradients, and the threshold does not know of it: while they are clipped, the ratio "
            "shown is above the true one."
        )
    if facts.get("empirical"):
        out.append(
            f"The threshold of {facts.get('optimizer')} is not known. Its ratio is empirical, along the steps that it "
            "takes: 1 at the edge, but it says little about how near the edge is."
        )
    if own.rates is not None and own.rates[1] > 1.2 * own.rates[0]:
        out.append(
            f"The learning rate was still growing at the end ({own.rates[0]:.2g} to {own.rates[1]:.2g}): its peak was "
            "not seen. More steps would show it."
        )
    if own.ended == "itself":
        out.append(f"The job ended by itself after {own.steps} of {steps} steps.")
    return out


def band(held: Interval) -> str:
    """A median with the range around it."""
    return f"{in_digits(held.value)} in the median, {in_digits(held.low)} to {in_digits(held.high)}"


def interval(held: Interval) -> str:
    """A value with its 95 % interval."""
    return f"{held.value:.2f} ({held.low:.2f} to {held.high:.2f})"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _sentence(parts: Sequence[str]) -> str:
    text = "; ".join(p.rstrip(".") for p in parts)
    return f"{text[0].upper()}{text[1:]}."
