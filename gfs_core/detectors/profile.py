"""Every threshold and window of the early warning, with the table that it comes from."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from gfs_core.detectors.base import AlertLevel

_ZOO = "benchmarks/danger.md"  # warnings before breaks, at an equal rate of false alarms on healthy trainings
_HELD = "tests/core/test_profile.py"  # in no table: streams in which each number makes a difference
_ENDS = "tests/core/test_alarm_ends.py"  # in no table: harmed trainings that come back, in part or not at all
_SOLVED = "tests/core/test_detectors.py"  # in no table: the recorded trainings of benchmarks have no solved ratios


def level_of(value: float, thresholds: tuple[float, float]) -> AlertLevel:
    """What a value says, by the thresholds from which on it is watched, and is an alarm."""
    watch, alarm = thresholds
    if not value >= watch:  # as of nearly all, and of NaN
        return AlertLevel.QUIET
    return AlertLevel.ALARM if value >= alarm else AlertLevel.WATCH


def _threshold(default: Any, text: str, source: str) -> Any:
    """A threshold, or one to watch from and one for an alarm: a strictness multiplies it."""
    return field(default=default, metadata={"help": text, "source": source, "scales": True})


def _setting(default: Any, text: str, source: str) -> Any:
    return field(default=default, metadata={"help": text, "source": source, "scales": False})


@dataclass(frozen=True)
class Profile:
    """The numbers of all rules. The metadata of each field say what it is, and the page that shows what it does.

    Those of the gradient and the loss were chosen on the trainings of ``design.py`` and ``trial.py`` in
    ``benchmarks/zoo``, and are reported on others in ``benchmarks/health.md`` and ``benchmarks/danger.md``. A number
    that is in no table names the tests that hold it.

    Example:
        >>> Profile().scaled(2.0).rise
        (1.5, 2.5)
    """

    # A stability ratio against the run's own level.
    ratio_window: int = _setting(
        15, "latest ratios that make up the usual one: fewer are too noisy, more lag behind a healthy drift", _HELD
    )
    rise: tuple[float, float] = _threshold(
        (0.75, 1.25), "above the usual ratio, relative to it: 0.8 % and 0.3 % of healthy ratios are", _HELD
    )
    negligible_ratio: float = _setting(
        0.05, "a ratio below this is so far from the edge that no rise of it matters", _HELD
    )
    long_rise: float = _setting(
        2.0, "times the usual ratio of before: a ratio that has long been rising is only watched …", _HELD
    )
    jump: float = _threshold(2.5, "… unless it is this far above its usual value, relative to it", _HELD)
    running_agree: int = _setting(1, "latest running ratios that have to agree: each is an average", _HELD)
    solved_agree: int = _setting(2, "latest solved ratios that have to agree: each is that of one batch", _SOLVED)
    ratio_patience: int = _setting(5, "quiet ratios that take the level down by one", _ENDS)

    # Growth towards the edge.
    fit_window: int = _setting(6, "ratios in the fit: with more it still holds the level before", _HELD)
    fit_correlation: float = _setting(
        0.97, "correlation of log ratio with the step, from which on the growth counts as steady", _HELD
    )
    fit_growth: float = _setting(1.35, "least growth within the fit: progressive sharpening is slower", _HELD)
    fit_horizon: int = _setting(500, "steps: an edge that is crossed later than that is not mentioned", _HELD)
    closeness: tuple[float, float] = _threshold(
        (1 / 150, 1 / 100),
        "1 / steps until the edge is crossed: time to act, near enough to be believed",
        _HELD,
    )
    grown: tuple[float, float] = _threshold(
        (0.6, 0.95), "above the usual ratio besides, relative to it: an average of noise has trends", _HELD
    )

    # The learning rate against its own level.
    rate_window: int = _setting(50, "latest learning rates that make up the usual one", _HELD)
    rate_first: int = _setting(20, "learning rates before the rule for them begins", _HELD)
    rate_rise: tuple[float, float] = _threshold(
        (1.2, 1.5), "above the median rate, relative to it: a linear warm-up reaches 1", _HELD
    )
    rate_patience: int = _setting(20, "quiet learning rates that take the level down by one", _ENDS)

    # The gradient of the worst layer, and the growth of the weights.
    gradient_window: int = _setting(100, "latest gradients that make up the usual one of a layer", _ZOO)
    weight_steps: int = _setting(25, "steps over which the growth of the weights counts", _ZOO)
    gradient_first: int = _setting(8, "readings of a stream before it is judged", _ZOO)
    gradient_spread: float = _setting(0.2, "least spread of the logarithm of a layer's gradient", _ZOO)
    weight_growth: float = _setting(
        0.08, "growth of the weights' logarithm that counts as one spread of the gradient", _ZOO
    )
    most_growth: float = _setting(2.2, "that the growth of the weights counts at most: alone it is watched", _ZOO)
    gradient_memory: float = _setting(0.8, "weight of the past in the score of gradient and growth", _ZOO)
    gradient: tuple[float, float] = _threshold((1.7, 2.6), "score of gradient and growth, in spreads", _ZOO)
    gradient_patience: int = _setting(20, "quiet gradients that take the level down by one", _ENDS)

    # Gradients beside the second moments of an adaptive optimizer.
    normalised_window: int = _setting(50, "latest normalised gradients that make up the usual one", _ZOO)
    normalised_first: int = _setting(20, "normalised gradients before they are judged", _ZOO)
    normalised: tuple[float, float] = _threshold((0.45, 0.7), "logarithm of how far they are above the usual", _ZOO)
    outgrown: float = _setting(
        1.5, "times the usual normalised gradient, from which on no swing at the edge is taken for granted", _ZOO
    )

    # What a run came through before, and where it has little to lose.
    stood_steps: int = _setting(100, "steps without harm after which a rise counts as stood", _ZOO)
    harm: float = _setting(
        0.2, "of what the loss has fallen so far, by which the latest losses are above the best", _ZOO
    )
    above_stood: float = _setting(1.25, "times the highest rise that was stood, which a rise has to pass", _ZOO)
    most_strict: float = _setting(4.0, "times its thresholds that this makes a rule stricter at most", _ZOO)
    fitted: float = _setting(0.05, "of what the loss has fallen: below it a training has little to lose …", _ZOO)
    stricter: float = _setting(1.5, "… and gradients have to rise so much farther; as where a rate comes back", _ZOO)

    # The loss.
    loss_window: int = _setting(100, "latest losses that make up the usual one", _ZOO)
    loss_first: int = _setting(20, "losses before the rules for them begin", _ZOO)
    loss_memory: float = _setting(0.9, "weight of the past in the mean of losses, per step", _ZOO)
    spike_memory: float = _setting(0.7, "weight of the past in a burst of the loss, per step", _ZOO)
    spike: tuple[float, float] = _threshold((4.0, 6.0), "a burst of the loss, in spreads", _ZOO)
    mean_rise: tuple[float, float] = _threshold((0.6, 1.0), "the mean loss above the median, in units as follow", _ZOO)
    mean_high: float = _setting(0.6, "of the distance of the upper twentieth of losses: one unit at least …", _ZOO)
    small_rise: float = _setting(0.1, "… and this part of what the loss has fallen so far", _ZOO)
    small_loss: float = _setting(0.05, "of what the loss has fallen: one spread of a burst at least", _ZOO)
    loss_patience: int = _setting(20, "quiet losses that take the level down by one", _ENDS)

    # What the losses and the edge say to the other rules.
    falls: float = _setting(
        0.02, "of what the loss has fallen so far, by which the latest losses are below: no gradient is judged", _ZOO
    )
    at_edge: tuple[float, float] = _setting(
        (0.7, 1.6), "stability ratios at which a steady run swings, and comes back by itself", _ZOO
    )
    beyond_swing: float = _setting(
        0.5, "of what the loss has fallen so far: a swing at the edge that goes beyond is an alarm", _ZOO
    )
    losses_back: int = _setting(
        100, "losses in a row with their mean back, from which on a ratio or a rate may stay high", _ENDS
    )

    def scaled(self, strictness: float) -> Profile:
        """The same rules with every threshold multiplied; above 1 they speak less.

        Windows, patience and what excludes a rule stay. So rules are compared at equal rates of false alarms.
        """
        changed: dict[str, Any] = {}
        for spec in fields(self):
            if spec.metadata["scales"]:
                held = getattr(self, spec.name)
                pair = isinstance(held, tuple)
                changed[spec.name] = tuple(strictness * v for v in held) if pair else strictness * held
        return replace(self, **changed)
