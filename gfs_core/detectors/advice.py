"""What to do at an alarm: for each rule the remedy that helped most often where all were tried out.

Chosen on the trainings of ``benchmarks/zoo/design.py``. How often each helped on others is in ``benchmarks/advice.md``.
"""

from __future__ import annotations

from typing import NamedTuple

BACK = 50  # steps before an alarm that the checkpoint was, in those trials
WHAT_TO_DO = "; what to do: "  # between the reason of an alarm and its advice


class _Advice(NamedTuple):
    """Advice of a rule.

    Attributes:
        remedy: its name in the trials.
        later: the words; ``step`` is that from before which a checkpoint is taken.
        early: the words for an alarm that comes before there can be one.
    """

    remedy: str
    later: str
    early: str


_LOWER = _Advice(
    "go back, rate / 3",
    "go back to a checkpoint from before step {step}, and train on at a third of its learning rate",
    "start again at a third of the learning rate",
)
_AGAIN = "; if it comes again, look at the data"
_LEAVE_OUT = _Advice(
    "go back",
    "go back to a checkpoint from before step {step}, and leave out the batches since" + _AGAIN,
    "start again, and leave out the batches so far" + _AGAIN,
)
ADVICE = {
    "gradient": _LOWER,
    "second moment": _LOWER,
    "rise": _LOWER,
    "loss": _LOWER,
    "rate": _Advice(
        "go back",
        "if it is not meant, go back to a checkpoint from before step {step}, and stay at its learning rate",
        "if it is not meant, start again at a learning rate that does not rise",
    ),
    "spike": _LEAVE_OUT,
    "not finite": _LEAVE_OUT,
}
"""By rule. There was no case of those that are not here."""


def advice(rule: str, step: int) -> str:
    """What to do at an alarm of a rule; empty where that is not known.

    Args:
        rule: as an alert names it.
        step: of the alarm.
    """
    found = ADVICE.get(rule)
    if found is None:
        return ""
    return found.later.format(step=step - BACK) if step > BACK else found.early
