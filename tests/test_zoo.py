"""Rules of others, over trainings that the benchmarks record, are what their packages compute."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.rescue import in_danger
from benchmarks.zoo.breaks import mean_lead
from benchmarks.zoo.danger import OURS, compared, render
from benchmarks.zoo.hooks import GuardRatio, Hooks, kurtosis
from benchmarks.zoo.live import compact, left_alone, watched
from benchmarks.zoo.rivals import AS_IT_COMES, RIVALS, alarms_of, changepoint, crossing, guard_ratio
from benchmarks.zoo.training import Array, Stream, Training, plain, recorded


def stream_of(loss: Array, **whole: Array) -> Stream:
    return Stream([], loss, np.ones(len(loss)), np.full(len(loss), np.nan), whole, {})


def test_a_gradient_of_one_weight_over_its_own_mean() -> None:
    ratio = GuardRatio()
    quiet = [ratio.after({"a": 1.0, "b": 1e-3}) for _ in range(10)]
    assert quiet == [-math.inf] * 10  # the first ten steps are not judged
    assert ratio.after({"a": 12.0, "b": 1e-3}) == pytest.approx(12 / 1.11)
    # the mean of "a" is now 1.11, and of "b" .001; an alarm of "b" needs more than .01
    assert ratio.after({"a": 1.0, "b": 0.01}) == pytest.approx(1 / (0.99 * 1.11 + 0.01))
    assert ratio.after({"a": 0.001, "b": math.nan}) == math.inf
    assert ratio.after({"a": 0.001, "b": 0.011}) == pytest.approx(0.011 / (0.99 * 0.00109 + 0.01 * 0.011))


def test_a_sum_of_losses_starts_again_at_its_limit() -> None:
    loss = np.tile([1.0, 2.0, 3.0], 12)[:33]
    loss[30:33] = 2 + 1.4826 * np.array([4.0, 5.0, 9.0])  # the median is 2 and the deviation 1.4826
    found = changepoint(stream_of(loss))
    assert (found[:30] == -math.inf).all()  # 30 losses come first
    assert found[30:33] == pytest.approx([3.0, 7.0, 8.0])  # 4 - 1; + 5 - 1, an alarm; 9 - 1
    falls = np.concatenate([loss[:30], [2 - 1.4826 * 8]])
    assert changepoint(stream_of(falls))[30] == pytest.approx(7.0)  # a loss that falls counts too
    assert changepoint(stream_of(np.append(loss[:30], math.nan)))[30] == math.inf


def test_kurtosis_counts_once_it_is_high_three_times() -> None:
    x = np.tile([1.0, 2.0, 3.0, 2.0], 15)
    x[50:55] = [20.0, 30.0, 10.0, 40.0, 2.0]
    found = crossing(stream_of(np.ones(60), kurtosis=x))  # the least of three, in deviations: usual is 2 ± 1.4826
    assert found[50:55] == pytest.approx([-1 / 1.4826, 0, 8 / 1.4826, 8 / 1.4826, 0])
    assert [a.start for a in alarms_of(found, 3.0)] == [52]
    assert (crossing(stream_of(np.ones(60))) == -math.inf).all()  # not recorded
    assert (guard_ratio(stream_of(np.ones(60))) == -math.inf).all()


def test_kurtosis_of_known_values() -> None:
    assert float(kurtosis(torch.tensor([[1.0, -1.0], [1.0, -1.0]]))) == -2.0
    assert float(kurtosis(torch.tensor([0.0, 0, 0, 0, 0, 0, 0, 8]))) == pytest.approx((49 + 7 / 49) / 8 - 3)
    assert float(kurtosis(torch.ones(3))) == 0.0


class Twice(nn.Module):
    """A layer that runs twice; what it returns first is overwritten in place, and hardly counts."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.act = nn.Linear(3, 4), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        first = self.layer(x)
        return first.sum() * 0 + 3 * self.layer(2 * x).sum() + 0 * self.act(first).sum()


def test_hooks_read_the_last_run_and_the_largest_gradient_and_only_in_training() -> None:
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(5, 3)
    hooks, step_losses = Hooks(model), []

    def steps() -> Iterator[float]:
        for _ in range(12):
            model.zero_grad()
            loss = model(x)
            loss.backward()
            yield loss.item()

    for loss in hooks.steps(steps()):
        step_losses.append(loss)
        (10 * model(100 * x)).backward()  # of no training step
    assert len(step_losses) == 12
    with torch.no_grad():
        expected = float(kurtosis(model.layer(2 * x)))
    assert hooks.whole["kurtosis"] == pytest.approx([expected] * 12)
    means = hooks._ratio._means
    assert set(means) == {"layer", "act", "layer.weight", "layer.bias"}
    assert means["layer"] == pytest.approx(3 * math.sqrt(20))  # 3 for each of 5 × 4 outputs of the run that counts
    assert means["layer.bias"] == pytest.approx(3 * 5 * 2)
    assert means["act"] == 0
    assert hooks.whole["guard_ratio"] == pytest.approx([-math.inf] * 10 + [1.0] * 2)
    assert not model.layer._forward_hooks


def test_a_training_is_the_same_with_its_signals_recorded() -> None:
    def made() -> Training:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        x = torch.randn(16, 4)
        return plain(model, optimizer, lambda b: model(b).square().mean(), itertools.repeat(x), 20)

    stream = recorded(made())
    assert stream.loss.tolist() == [step.loss for step in made().steps]
    assert np.isfinite(stream.whole["kurtosis"]).all()
    assert np.isfinite(stream.whole["guard_ratio"][10:]).all()


def test_who_leads_whom() -> None:
    assert mean_lead([250, 7, 0, -2, None]) == pytest.approx((200 + 7 + 0 - 2 - 4) / 5)
    assert mean_lead([]) == -4
    leads = {OURS: {"a": 3.0, "b": 5.0, "c": 1.0}, "loud": {"a": 9.0, "b": 9.0, "c": 9.0},
             "quiet": {"a": 4.0, "b": 6.1, "c": 0.9}}  # fmt: skip
    ahead, behind = compared(leads, ["quiet"])
    assert ahead == {OURS: ["b"], "loud": ["a", "b", "c"], "quiet": ["b"]}
    assert behind == {OURS: ["c"], "loud": [], "quiet": ["c"]}


def test_the_page_counts_leads_and_says_what_was_not_recorded() -> None:
    told: dict[str, list[int | None]] = {rule: [None] for rule in RIVALS}
    told |= {OURS: [10], "loss, CUSUM": [12], "kurtosis, trainscope": []}
    false = {rule: {"alarms": 1.0, "under": 0.25} for rule in [OURS, *RIVALS]}
    rows = [{"kind": "some", "seed": 0, "breaks": 1, "told": told},
            {"kind": "none", "seed": 0, "breaks": 0, "told": {rule: [] for rule in told}}]  # fmt: skip
    lines = render({"danger": rows, "false": false}).splitlines()
    cells = {line.split(" | ")[0]: line.strip("| ").split(" | ") for line in lines if line.startswith("| ")}
    place = 3 + list(RIVALS).index("kurtosis, trainscope")
    assert cells["| some"][2:4] == ["1.00 · 1.00 · 10", "0.00 · 0.00 · –"]
    assert cells["| some"][place] == cells["| **mean share warned**"][place] == "–"
    assert cells["| **mean share warned**"][2] == "1.00"
    cusum = 3 + list(RIVALS).index("loss, CUSUM")
    of_rule, of_ours = cells["| **kinds where a rule leads ours by more than a step**"], lines[-1]
    assert (of_rule[2], of_rule[3], of_rule[cusum]) == ("1", "0", "1")
    assert of_ours.startswith("| **kinds where ours leads every rule** |  | 0 | 1 |")
    assert "early warning, as it comes 1.0, 0.250; " in "\n".join(lines)
    assert set(AS_IT_COMES) < set(RIVALS)


def one_step_at_a_time(steps: int) -> Training:
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    data = itertools.repeat((x, x[:, :3]))
    loss = lambda b: (model(b[0]) - b[1]).square().mean()  # noqa: E731
    return plain(model, torch.optim.SGD(model.parameters(), 0.1), loss, data, steps)


def test_a_monitor_leaves_a_healthy_training_as_it_is_and_counts_what_it_did() -> None:
    alone = left_alone(one_step_at_a_time(150), "")
    seen = watched(one_step_at_a_time(150), "rescue")
    assert seen["losses"] == alone["losses"]
    assert (seen["alarms"], seen["skipped"], seen["rollbacks"]) == ([], 0, 0)
    assert seen["ratios"] > 0
    row = compact(seen)
    assert (row["steps"], row["end"]) == (150, pytest.approx(alone["losses"][-25], rel=0.1))


@pytest.mark.parametrize(("rule", "skipped"), [("skip: loss", 1), ("skip: gradient", 1), ("", 0)])
def test_a_rule_of_others_leaves_out_a_step_that_is_far_from_usual(rule: str, skipped: int) -> None:
    training = one_step_at_a_time(120)

    def spoilt() -> Iterator[Any]:
        for k, step in enumerate(training.steps):
            if k == 100:
                for p in training.model.parameters():
                    assert p.grad is not None
                    p.grad *= 1e6
            yield step._replace(loss=step.loss * (1e6 if k == 100 else 1.0))

    assert left_alone(dataclasses.replace(training, steps=spoilt()), rule)["skipped"] == skipped


def test_runs_that_end_well_are_told_from_those_that_do_not() -> None:
    def row(end: float | None, seconds: float = 1.0) -> dict[str, Any]:
        return {"first": 1.0, "best": 0.0, "end": end, "steps": 10, "seconds": seconds}

    ends = {"nothing": [None, 0.3], "alarm=rescue": [0.1, 0.3]}
    rows = {f"kind | {way} | {seed}": row(end) for way, own in ends.items() for seed, end in enumerate(own)}
    assert "| kind | 0% | 50% |" in in_danger(rows)
