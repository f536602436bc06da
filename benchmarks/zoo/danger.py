"""The page of trainings in danger: who warns of breaks, and how long before."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.lib.tables import table
from benchmarks.zoo.breaks import AHEAD, UNTOLD, mean_lead
from benchmarks.zoo.rivals import RIVALS

ALLOWED = 2e-4  # false alarms per healthy step, to which the rules of others are tuned
OURS = "early warning, as it comes"
DANGER = """# Trainings in danger

    OMP_NUM_THREADS=1 python -m benchmarks.zoo.record && python -m benchmarks.zoo

A training *breaks* where the median of the next ten losses is above the best so far by a fifth of the progress (or by a
tenth of the first loss), or is not finite; with full batches also where a loss is five times the median of the last
hundred. *Warned*: breaks before which an alarm stood, up to 200 steps ahead but after the fault, if there is one;
*lead*: the median of the steps that were left. *Told*: breaks of which an alarm told at the latest three steps after.
The rules of others have the lowest threshold with at most 2 false alarms in 10,000 steps of the trainings of
[health.md](health.md), unless they are as they come, with the threshold that they bring with them. A cell: warned ·
told · lead; –: no break, or the rule has nothing to read there, as without a second moment.

A rule *leads* another on a kind by the difference of their means, over its breaks, of the steps by which they warned,
at most {ahead}; 0 at the break, negative behind it, {untold} for a break that they did not tell of. In the column of a
rule: kinds on which it leads ours by more than a step, and kinds on which ours leads it. In our column: kinds on which
any rule leads ours by more than a step, and on which ours leads every rule; there only rules count that keep to those 2
false alarms.

False alarms in 10,000 healthy steps, and the share of these steps that is under alarm: {false}.
"""


def render(results: dict[str, Any]) -> str:
    """The page."""
    rows, false = results["danger"], results["false"]
    kinds = list(dict.fromkeys(r["kind"] for r in rows))
    rules = [OURS, *RIVALS]
    told = {rule: {k: [t for r in rows if r["kind"] == k for t in r["told"][rule]] for k in kinds} for rule in rules}
    cells = []
    for kind in kinds:
        own = [r for r in rows if r["kind"] == kind]
        broken = sum(r["breaks"] for r in own)
        cells.append([kind, f"{broken} in {len(own)}", *(_cell(told[rule][kind]) for rule in rules)])
    broke = [kind for kind in kinds if told[OURS][kind]]
    cells.append(["**mean share warned**", "", *(_mean([told[rule][kind] for kind in broke]) for rule in rules)])
    quiet = [rule for rule in RIVALS if false[rule]["alarms"] <= 1e4 * ALLOWED + 1e-9]
    leads, trails = compared({rule: {k: mean_lead(told[rule][k]) for k in broke} for rule in rules}, quiet)
    cells.append(["**kinds where a rule leads ours by more than a step**", "", *(len(leads[rule]) for rule in rules)])
    cells.append(["**kinds where ours leads every rule**", "", *(len(trails[rule]) for rule in rules)])
    told_false = "; ".join(f"{rule} {false[rule]['alarms']:.1f}, {false[rule]['under']:.3f}" for rule in rules)
    text = DANGER.format(false=told_false, ahead=AHEAD, untold=f"−{-UNTOLD}")
    return "\n".join([text, *table(["kind", "breaks in runs", *rules], cells), ""])


def compared(
    leads: dict[str, dict[str, float]], quiet: Sequence[str]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Kinds on which a rule leads ours by more than a step, and kinds on which ours leads it, by rule.

    Ours has the kinds on which any of the ``quiet`` rules leads it so, and those on which it leads all of these.

    Args:
        leads: by rule, and by kind of training, as :func:`mean_lead` has them.
        quiet: the rules that are seldom wrong in health.
    """
    ours = leads[OURS]
    ahead = {rule: [kind for kind in ours if own[kind] > ours[kind] + 1] for rule, own in leads.items()}
    behind = {rule: [kind for kind in ours if own[kind] < ours[kind]] for rule, own in leads.items()}
    ahead[OURS] = [kind for kind in ours if any(kind in ahead[rule] for rule in quiet)]
    behind[OURS] = [kind for kind in ours if all(kind in behind[rule] for rule in quiet)]
    return ahead, behind


def _mean(told: list[list[int | None]]) -> str:
    """The mean over kinds of the share of breaks that a rule warned of; 0 on a kind where it has nothing to read."""
    if not any(told):
        return "–"
    shares = [sum(t is not None and t > 0 for t in own) / max(len(own), 1) for own in told]
    return f"{sum(shares) / len(shares):.2f}"


def _cell(told: list[int | None]) -> str:
    if not told:
        return "–"
    before = [t for t in told if t is not None and t > 0]
    heard = sum(t is not None for t in told)
    lead = f"{median(before):.0f}" if before else "–"
    return f"{len(before) / len(told):.2f} · {heard / len(told):.2f} · {lead}"
