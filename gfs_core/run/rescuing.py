"""Skips steps, lowers the rate and goes back to snapshots, on behalf of a monitor."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from gfs_core.actions.lowered import FALLS, Lowered
from gfs_core.actions.plateau import Plateau
from gfs_core.actions.rescue import Decision, Rescue
from gfs_core.actions.start import Start
from gfs_core.detectors.base import Alert, AlertLevel
from gfs_core.optimizers.skipping import SkipHook
from gfs_core.run.buffers import Buffers
from gfs_core.run.measurable import unrescuable
from gfs_core.run.notices import Notices
from gfs_core.run.ranks import Ranks
from gfs_core.run.rollback import KEPT, Snapshot, Snapshots, Stateful
from gfs_core.run.watch import Watch

EVERY = 50  # steps between snapshots: at most a fiftieth of what a snapshot takes is added to a step
MARGIN = 5  # steps before an alarm in which the trouble may have begun already: a snapshot of them is not gone back to
NEAR = 12  # while the rate of a start rises: all that are kept reach back to where it was a tenth
FAR = 0.1  # of the weights' length: in its beginning, a run whose weights have hardly moved is not gone back from
_NOT_FINITE = "the step before was skipped: its gradient was not finite"


class Rescuing:
    """Carries out what a :class:`~gfs_core.actions.rescue.Rescue` decides.

    Args:
        model: the module that is trained.
        optimizer: its torch optimizer, or a wrapper of one.
        watch: the early warning; it is put back with the weights.
        lowered: the share of the user's rate; ``None``: steps are skipped only, there are no rollbacks.
        start: lets the rate rise at first; ``None``: there is no start.
        plateau: lowers the rate where the loss rests; ``None``: that is left as it is.
        ranks: the processes that train together; ``None``: this process only.
        notices: reports what is done and what cannot be.
        changed: called after a rollback, and when a start has ended: other weights, or another rate, are used now.

    Attributes:
        snapshots: the way back; it holds nothing where steps are skipped only.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        watch: Watch,
        lowered: Lowered | None,
        start: Start | None,
        plateau: Plateau | None,
        ranks: Ranks | None,
        notices: Notices,
        changed: Callable[[], None],
    ) -> None:
        self.watch, self.lowered, self.start, self.plateau, self.ranks = watch, lowered, start, plateau, ranks
        self.notices, self.changed = notices, changed
        self.rescue = Rescue(lowered is not None)
        self.snapshots = Snapshots(model, optimizer)
        self._buffers = Buffers(model)
        self._hook: SkipHook | None = SkipHook(optimizer, finite_only=ranks is None)
        self._losses: list[float] = []  # since the last decision
        self._asked = self._told = False
        if why := unrescuable(optimizer):
            self.leave_out(why)

    def protect(self, *beside: Stateful) -> None:
        """Keep and put back these too."""
        self.snapshots.beside += [of for of in beside if not any(of is known for known in self.snapshots.beside)]
        self.snapshots.drop()

    def leave_out(self, why: str) -> None:
        """Do without, and warn once of the reason.

        Raises:
            MeasurementError: with ``strict=True``, in place of the warning.
        """
        self.close()
        if self.start is not None and self.start.rising:
            self.start.end(math.inf)
            self.changed()
        self.notices.complain(f"no step is skipped, and there is no way back: {why}; an alarm only warns")

    def close(self) -> None:
        """Take the hooks off the optimizer, and free the snapshots."""
        if self._hook is not None:
            self._hook.close()
            self._hook = None
        self.snapshots.drop()

    def saw(self, losses: Iterable[float]) -> None:
        """Take in losses that have become known."""
        self._losses += losses

    def before_step(self, step: int, alerts: list[Alert]) -> list[str]:
        """Decide about the coming step, and act.

        Args:
            step: optimizer steps taken so far.
            alerts: those of this step.

        Returns:
            What was done, in words for the history.

        Raises:
            OtherRankFailed: another process has failed since the last exchange.
            RanksLost: another process does not answer.
        """
        losses, self._losses = self._losses, []
        hook, level = self._hook, self.watch.level
        if hook is None or level is None:
            return []
        self._look(hook)
        done = [_NOT_FINITE] if hook.not_finite else list[str]()
        decision = self.rescue.decide(step, level, alerts, losses)
        start = self._start_with(losses)
        if given_up := self.lowered is not None and not self.lowered.may_fall():
            decision = Decision.TAKE
        if start is not None:
            ends = start.lost or decision is Decision.GO_BACK
            decision = Decision.GO_BACK if ends else Decision.SKIP if decision is Decision.SKIP else Decision.TAKE
        self._asked = hook.asked = decision in (Decision.SKIP, Decision.GO_BACK)
        if given_up:
            done += self._only_save(step, alerts)
        elif decision is Decision.SKIP:
            self._buffers.put_back()
            done.append("the step was skipped: nothing is updated by it")
        elif decision is Decision.GO_BACK:
            done += self._go_back(step, hook) if start is None else self._end_start(step, start, hook)
        elif decision is Decision.LOWER:
            done.append(self._lower(step))
        elif self._wants_snapshot(step, level, start):
            done += self._keep(step)
        self._buffers.note()
        return done + self._rests(level, losses)

    def _start_with(self, losses: list[float]) -> Start | None:
        """The start, if it lasts, after it has taken in these losses."""
        start = self.start
        if start is None or not start.rising:
            return None
        start.saw(losses)
        if start.blind:
            self.notices.warn_once(
                "control='start' goes by the losses of training and knows none, so the rate rises to the user's "
                "whatever happens; give `loss=` to `monitor.step`"
            )
        return start

    def _rests(self, level: int, losses: list[float]) -> list[str]:
        """Let a lower rate be tried out where the loss rests; trouble ends that."""
        if self.plateau is None:
            return []
        if level == AlertLevel.ALARM:
            self.plateau.restart()
            return []
        said = [text for loss in losses if (text := self.plateau.add(loss))]
        for text in said:
            self.notices.warn_always(text)
        return said

    def _wants_snapshot(self, step: int, level: int, start: Start | None) -> bool:
        if self.lowered is None:
            return False
        if not len(self.snapshots):
            return level != AlertLevel.ALARM or start is not None
        if start is not None and start.below:
            return step % NEAR == 0
        return level != AlertLevel.ALARM and step % EVERY == 0

    def _keep(self, step: int) -> list[str]:
        """Take a snapshot."""
        kept = None
        with self.notices.harmless("there is no snapshot of this step to go back to", alone=True):
            kept = self.snapshots.take(step)
        if kept is None:
            return []
        kept.known = copy.deepcopy({"watch": self.watch.state_dict()})
        if self._told:
            return []
        self._told = True
        return [f"{KEPT} snapshots to go back to take {self.snapshots.bytes / 1e6:.3g} MB on the host"]

    def _go_back(self, step: int, hook: SkipHook) -> list[str]:
        """Go back to a snapshot from before the trouble, on all processes or on none."""
        assert self.lowered is not None
        began = step if self.rescue.began is None else self.rescue.began
        snapshot = self.snapshots.before(began - MARGIN)
        near = self.rescue.beginning and snapshot is not None and self.snapshots.moved_since(snapshot) < FAR
        if not self._all_have(-1 if snapshot is None or near else snapshot.step) or snapshot is None or near:
            self._asked = hook.asked = False
            self.rescue.stayed()
            if near:
                return []
            text = "the run does not go back, though losses stay bad: there is no snapshot of the weights trained now"
            self.notices.warn_once(text)
            return [text]
        self._return_to(snapshot, step)
        self.lowered.fall()
        self.changed()
        text = (
            f"the run went back at step {step} to the weights of step {snapshot.step}, as losses stayed bad; "
            f"{self._now_used()}"
        )
        self.notices.warn_always(text)
        return [text]

    def _return_to(self, snapshot: Snapshot, step: int) -> None:
        self.snapshots.restore(snapshot)
        self.watch.load_state_dict(copy.deepcopy(snapshot.known["watch"]))
        self.rescue.went_back(step)

    def _end_start(self, step: int, start: Start, hook: SkipHook) -> list[str]:
        """End the start: go back to where the rate was about what it is to be, on all processes or on none."""
        limit, snapshot = start.limit, self.snapshots.before(step - start.back)
        lost = start.lost or not self.rescue.beginning or snapshot is None
        near = not lost and snapshot is not None and self.snapshots.moved_since(snapshot) < FAR
        there = self._all_have(-1 if snapshot is None or near else snapshot.step)
        text = f"the loss was lost at step {step}, as the rate rose; it is kept below {limit:.3g} from now on"
        if there and snapshot is not None and not near:
            self._return_to(snapshot, step)
            text += f"; the run went back to the weights of step {snapshot.step}"
        else:
            self._asked = hook.asked = False
            self.rescue.stayed()
            text += "; there is no snapshot of the weights trained now to go back to"
        if near:
            return []
        start.end(limit)
        self.changed()
        self.notices.warn_always(text)
        return [text]

    def _lower(self, step: int) -> str:
        """Lower the rate, without a way back."""
        assert self.lowered is not None
        self.rescue.lowered(step)
        self.lowered.fall()
        text = f"losses have risen at the alarm of step {self.rescue.began}; {self._now_used()}"
        self.notices.warn_always(text)
        return text

    def _now_used(self) -> str:
        assert self.lowered is not None
        return f"the rate is {self.lowered.share:.3g} of the user's for {self.lowered.hold} steps, and then grows back"

    def _only_save(self, step: int, alerts: list[Alert]) -> list[str]:
        if not any(alert.level is AlertLevel.ALARM for alert in alerts):
            return []
        self.watch.trainer.save(step)
        text = (
            f"the rate was lowered {FALLS} times in a row, and that did not help: a checkpoint is saved at an alarm, "
            "and training goes on as it is"
        )
        self.notices.warn_once(text)
        return [text]

    def _all_have(self, step: int) -> bool:
        """Whether the snapshot is of the same step on all processes."""
        if self.ranks is None:
            return True
        total, squares = self.ranks.total([float(step), float(step) ** 2])
        return squares * self.ranks.size == total**2

    def _look(self, hook: SkipHook) -> None:
        """Warn once where a step was not skipped because the optimizer does not step by its method."""
        if self._asked and not hook.seen:
            self.notices.warn_once(
                "a step that was to be skipped was taken: the weights move without `optimizer.step()`, by other "
                "methods of the optimizer or inside the backward pass"
            )

    def state_dict(self) -> dict[str, Any]:
        """What the next decision depends on. Snapshots are not saved: the first one of a resumed run is taken anew."""
        shares = {name: None if of is None else of.state_dict() for name, of in self._shares().items()}
        return {"rescue": self.rescue.state_dict(), **shares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` left off."""
        self.rescue.load_state_dict(state["rescue"])
        for name, of in self._shares().items():
            if of is not None and state[name] is not None:
                of.load_state_dict(state[name])
        self.snapshots.drop()

    def _shares(self) -> dict[str, Lowered | Start | Plateau | None]:
        return {"lowered": self.lowered, "start": self.start, "plateau": self.plateau}
