"""Early warning: from the readings of a run to *quiet*, *watch* or *alarm*, with the reason.

A level rises against what the run did lately. It comes down when the run is back where it was before the rise. A second
rise is told of while the first lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gfs_core.detectors.base import Alert, AlertLevel, Detector, Finding
from gfs_core.detectors.baseline import running_ratio, solved_ratio
from gfs_core.detectors.context import Context
from gfs_core.detectors.gradient import GradientDetector
from gfs_core.detectors.loss import LossDetector
from gfs_core.detectors.profile import Profile
from gfs_core.detectors.rate import RateDetector
from gfs_core.detectors.second_moment import SecondMomentDetector
from gfs_core.signals.base import Reading

MakeDetector = Callable[[Profile, Context], Detector]
# A new detector is listed here. Readings of one step are best given in the order of what these read.
DETECTORS: list[MakeDetector] = [
    RateDetector,
    LossDetector,
    running_ratio,
    solved_ratio,
    SecondMomentDetector,
    GradientDetector,
]


class EarlyWarning:
    """Watches a run by its readings: losses, learning rates and stability ratios.

    Args:
        profile: the thresholds of all rules; ``None``: those of :class:`Profile`.
        detectors: what makes each detector; ``None``: all those that are listed here.

    Attributes:
        level: the present level, the gravest of what the detectors say: until the run is back.
        reason: why the level last changed; empty before it first does.

    Example:
        >>> from gfs_core import Key, Reading
        >>> gradient, warning = Key("grad_norm", "of a layer, or of all"), EarlyWarning()
        >>> for step in range(100):
        ...     _ = warning.observe(Reading(gradient, step, 0.2, "head"))
        ...     _ = warning.observe(Reading(gradient, step, 0.3))
        >>> _ = warning.observe(Reading(gradient, 100, 9.0, "head"))
        >>> alert = warning.observe(Reading(gradient, 100, 9.0))
        >>> print(alert.level.name, "–", alert.reason)
        ALARM – the gradient rose above its usual size: head 45 times
    """

    def __init__(self, profile: Profile | None = None, detectors: Sequence[MakeDetector] | None = None) -> None:
        self.level, self.reason = AlertLevel.QUIET, ""
        profile = Profile() if profile is None else profile
        self._context = Context(profile)
        self._detectors = [make(profile, self._context) for make in (DETECTORS if detectors is None else detectors)]
        self._readers: dict[str, list[Detector]] = {}
        for detector in self._detectors:
            for name in detector.reads:
                self._readers.setdefault(name, []).append(detector)

    def observe(self, reading: Reading) -> Alert | None:
        """Take in a reading; one that no detector reads or that has no value is passed over.

        Args:
            reading: of a key that is known by its name. Those of one step come in this order: learning rate, examples,
                loss, ratios, gradients, and of these the layers before the whole model. A loss or a gradient may be not
                finite; a ratio or a rate that is not finite and > 0 is a failed measurement, and passed over.

        Returns:
            The change of level that follows; ``None`` where there is none.
        """
        readers = self._readers.get(reading.key.name)
        if readers is None or reading.value is None:
            return None
        if reading.layer:
            readers = [detector for detector in readers if detector.by_layer]
        lately = AlertLevel.QUIET if self.level is AlertLevel.QUIET else self._lately()  # never above the level
        found = [(d.track, finding) for d in readers if (finding := d.observe(reading)) is not None]
        if not found:  # all was quiet, and stays so
            return None
        track, finding = max(found, key=lambda pair: pair[1].level)
        new = finding.level > self.level or (finding.level == self.level and finding.rising)
        if new and self._lately() > lately:
            return self._changed(reading.step, finding)
        return self._settled(
            reading.step, f"the last {track.patience} {track.readings} were nearer to their usual values"
        )

    def forget(self, step: int) -> Alert | None:
        """Drop what was measured on other weights than are trained from now on, and what that said.

        Returns:
            The change of level that follows; ``None`` where there is none.
        """
        for detector in self._detectors:
            detector.forget()
        return self._settled(step, "other weights are trained now, whose usual stability ratio is not known yet")

    def in_order(self, readings: Iterable[Reading]) -> list[Reading]:
        """Those readings that a detector reads, in the order in which they are best given, step after step."""
        places = {name: place for place, name in enumerate(self._readers)}
        known = (r for r in readings if r.key.name in places)
        return sorted(known, key=lambda r: (r.step, places[r.key.name], not r.layer))

    def _lately(self) -> AlertLevel:
        """The gravest level beside what the run did lately; where it rises, something new has begun."""
        return max(d.track.lately.level for d in self._detectors)

    def _settled(self, step: int, reason: str) -> Alert | None:
        """Take the level down to the gravest that the detectors hold, if it is lower."""
        level = max(d.track.level for d in self._detectors)
        if level is AlertLevel.QUIET:
            self._context.all_is_quiet()
        return None if level == self.level else self._changed(step, Finding(level, reason))

    def _changed(self, step: int, finding: Finding) -> Alert:
        self.level, self.reason = finding.level, finding.reason
        return Alert(step, finding.level, finding.reason, finding.rule, finding.layers)

    def state_dict(self) -> dict[str, Any]:
        """Everything the next alert depends on: numbers, strings, lists and dictionaries."""
        return {
            "level": int(self.level),
            "reason": self.reason,
            "context": self._context.state_dict(),
            "detectors": {d.name: d.state_dict() for d in self._detectors},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` left off.

        Raises:
            Exception: of any type, the state is damaged.
        """
        self.level, self.reason = AlertLevel(state["level"]), str(state["reason"])
        self._context.load_state_dict(state["context"])
        saved = dict(state["detectors"].items())
        for detector in self._detectors:
            if detector.name in saved:  # one that is new since has seen nothing yet
                detector.load_state_dict(saved[detector.name])
