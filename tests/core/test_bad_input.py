"""Whatever is in an option, a flag, a log or a checkpoint: a clear message, never a traceback from inside."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

import gfs_core as gfs
from gfs_core.run.history import read_settings
from gfs_report.runs import read_run
from tests.core.options import tuned

OPTIONS = {f.name: f.default for f in fields(gfs.GFSConfig)}
WORDS = ["gfs", "running", "cap", "off", "stop", "fixed", "nan", "inf", "1e999", "<script>", "a\0b", "\ud800", "-1", ""]
ATOMS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 2**63, 10**400])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(WORDS)
)
VALUES = st.recursive(
    ATOMS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)
ODD = st.sampled_from([np.ones(2), np.int64(3), torch.ones(2), object(), int, b"gfs", 1j, ("gfs",), Path("x")])


def many(examples: int) -> settings:
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]  # each example writes its own files anew
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=checks)


def tried(call: Callable[[], Any]) -> tuple[Any, str]:
    """What ``call`` returns, or ``None`` and why it refused; any other error is one of the test."""
    try:
        return call(), ""
    except gfs.ConfigError as error:
        return None, str(error)


# --- options and flags ----------------------------------------------------------------------------------------------


@many(400)
@given(st.dictionaries(st.sampled_from(sorted(OPTIONS)) | st.text(max_size=8), VALUES | ODD, max_size=2))
@example({"tier": np.ones(2)})
@example({"max_memory": 10**400})
@example({"seed": 2**64})
@example({"history": "a\0b"})
def test_any_value_of_an_option_is_taken_or_named(options: dict[str, Any]) -> None:
    config, refused = tried(lambda: gfs.GFSConfig.from_options(**options))
    if config is None:
        assert any(name in refused for name in options)
        return
    model = nn.Linear(2, 1)
    quick = {"max_overhead": None, "tier": config.tier if config.tier != "gfs_full" else "gfs", "history": None}
    monitor = gfs.StabilityMonitor(
        model, torch.optim.SGD(model.parameters(), 0.1), gfs.GFSConfig(**(asdict(config) | quick))
    )
    tuned(monitor, max_grads=5)
    monitor.journal.path = None if config.history is None else Path("/dev/null") / config.history  # nowhere
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        monitor.step(lambda x: model(x).square().mean(), torch.ones(4, 2), 0, loss=1.0)
    assert not any("failed when it was evaluated again" in str(w.message) for w in told)


def test_a_rate_that_is_no_number_does_not_end_training(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    for rate in (float("nan"), float("inf"), 1e308):
        path = tmp_path / f"{rate}.jsonl"
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        options = gfs.GFSConfig(every=1, max_overhead=None, history=str(path))
        monitor = gfs.StabilityMonitor(model, optimizer, options)
        optimizer.param_groups[0]["lr"] = rate
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = monitor.step(lambda x: model(x).square().mean(), torch.ones(4, 2), 0, loss=1.0)
        assert found is not None
        assert all(np.isfinite(v) for v in found.values().values())
        assert gfs.read_history(path) == [found]


@cache
def parser() -> Any:
    transformers = pytest.importorskip("transformers")
    from hf_gfs import GFSArguments

    return transformers.HfArgumentParser(GFSArguments)


@many(150)
@given(st.sampled_from(sorted(OPTIONS)), st.lists(ATOMS.map(str) | st.sampled_from(WORDS), max_size=2))
@example("max_memory", ["1e301"])
@example("every", ["9" * 5000])
def test_any_value_of_a_flag_is_taken_or_named(name: str, values: list[str]) -> None:
    try:
        code = 0
        [arguments] = parser().parse_args_into_dataclasses([f"--gfs_{name}", *values], look_for_args_file=False)
    except SystemExit as error:  # argparse has said which flag
        code = error.code
        arguments = None
    except ValueError as error:  # the parser says which words are left over
        code, arguments = 2 if "not used by the HfArgumentParser" in str(error) else 1, None
    if arguments is None:
        assert code == 2
        return
    config, refused = tried(arguments.config)
    assert isinstance(config, gfs.GFSConfig) or name in refused


# --- logs -----------------------------------------------------------------------------------------------------------

DEEP = "[" * 20_000
MEASURED = {"step": 3, "optimizer_name": "SGD", "sharpness": 2.0, "alarm": 1, "reasons": ["why"]}
LINES = (
    st.binary(max_size=20)
    | VALUES.map(lambda v: json.dumps(v).encode())
    | st.tuples(st.sampled_from([*MEASURED, "run", "threshold", "overhead", "odd"]), VALUES).map(
        lambda pair: json.dumps(MEASURED | {pair[0]: pair[1]}).encode()
    )
    | VALUES.map(lambda v: json.dumps({"settings": v}).encode())
    | st.tuples(st.sampled_from(["run", "name", "began", "resumed_at"]), VALUES).map(
        lambda pair: json.dumps({"settings": {}, "run": "a", "resumed_at": 2, pair[0]: pair[1]}).encode()
    )
    | st.sampled_from([DEEP, '{"settings": ' + DEEP, '{"step": 1, "x": ' + DEEP, "9" * 5000]).map(str.encode)
)


@many(250)
@given(lines=st.lists(LINES, max_size=4), whole=st.booleans())
@example(lines=[DEEP.encode()], whole=True)
@example(lines=[b'{"settings": ' + DEEP.encode()], whole=True)
@example(lines=[json.dumps(MEASURED | {"optimizer_name": name}).encode() for name in (None, 0)], whole=False)
@example(lines=[json.dumps(MEASURED | {"step": 2**63}).encode()], whole=False)
@example(lines=[json.dumps(MEASURED | {"sharpness": 10**400}).encode()], whole=False)
def test_any_line_of_a_history_is_read_or_passed_over(tmp_path: Path, lines: list[bytes], whole: bool) -> None:
    path = tmp_path / "history.jsonl"
    good = [b'{"settings": {"every": 7}}', json.dumps({"step": 1, "optimizer_name": "SGD", "hvps": 5}).encode()]
    path.write_bytes(b"\n".join([*lines, *good] if whole else lines))
    assert isinstance(read_settings(path), dict)
    found, _ = tried(lambda: gfs.read_history(path))
    if found is not None:
        assert [m.step for m in found] == sorted(m.step for m in found)
    read_or_refused(path)
    if whole:
        assert found is not None
        assert 5 in [m.hvps for m in found if m.step == 1]
        assert read_settings(path) == {"every": 7}


def read_or_refused(path: Path) -> None:
    """The file alone, and its folder, are read or refused with their name."""
    for place in (path, path.parent):
        run, refused = tried(lambda place=place: read_run(place))
        if run is None:
            assert str(path.parent) in refused
        else:
            curves = [*run.gfs.values(), *run.logged.values()]
            assert curves
            assert all(len(c.steps) == len(c.values) for c in curves)
            assert all(np.isfinite(c.values).all() for c in run.gfs.values())


ROWS = st.lists(st.dictionaries(st.sampled_from(["step", "loss", "gfs/sharpness", "epoch", ""]), VALUES), max_size=4)


@many(150)
@given(text=st.binary(max_size=60) | ROWS.map(lambda rows: json.dumps({"log_history": rows}).encode()))
@example(text=DEEP.encode())
@example(text=b'{"log_history": [{"step": 1e300, "loss": 1}, {"step": 1, "loss": 1}]}')
def test_any_trainer_state_is_read_or_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "trainer_state.json"
    path.write_bytes(text)
    read_or_refused(path)


CELLS = st.sampled_from(["step", "loss", "gfs/alarm", "1", "2.5", "1e300", "nan", '"', "\n", ",", "\0", "\r", "é"])


@many(150)
@given(text=st.binary(max_size=60) | st.lists(CELLS, max_size=20).map(lambda c: ("step,loss\n" + ",".join(c)).encode()))
@example(text=b'step,loss\n1,"' + b"a" * 200_000)
@example(text=b"step,loss\n1e300,2\n")
def test_any_csv_is_read_or_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(text)
    read_or_refused(path)


@many(60)
@given(payloads=st.lists(st.binary(max_size=30), max_size=3), cut=st.integers(0, 40), rest=st.binary(max_size=20))
def test_any_event_file_is_read_or_refused(tmp_path: Path, payloads: list[bytes], cut: int, rest: bytes) -> None:
    writing = pytest.importorskip("tensorboard.summary.writer.record_writer")
    path = tmp_path / "events.out.tfevents.1"
    with path.open("wb") as file:
        records = writing.RecordWriter(file)
        for payload in payloads:
            records.write(payload)  # with the right checksum: what is inside is what is wrong
        records.flush()
    held = path.read_bytes()
    path.write_bytes(held[: len(held) - cut] + rest)
    read_or_refused(path)


# --- checkpoints ----------------------------------------------------------------------------------------------------


class Training:
    """A small model with a monitor that has seen a few steps."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 2)
        self.optimizer = torch.optim.Adam(self.model.parameters(), 0.01)
        config = gfs.GFSConfig(tier="sharpness", every=2, running_every=1, control="follow", **options)
        monitor = gfs.StabilityMonitor(self.model, self.optimizer, config)
        self.monitor = tuned(monitor, beside={"directional": 1}, tol=0.1)

    def train(self, steps: int) -> list[gfs.Measurement]:
        found = []
        for _ in range(steps):
            x = torch.randn(8, 3)
            self.optimizer.zero_grad()
            loss = self.model(x).square().mean()
            loss.backward()
            found.append(self.monitor.step(lambda b: self.model(b).square().mean(), x, loss=loss))
            self.optimizer.step()
        return [m for m in found if m is not None]


@cache
def saved() -> dict[str, Any]:
    training = Training(probe="fixed", probe_size=32, max_overhead=None)
    training.train(8)
    state = training.monitor.state_dict()
    state["measuring"]["learned"]["fits"] = 6
    return state


def paths(held: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of everything in nested dictionaries and lists."""
    items = held.items() if isinstance(held, dict) else enumerate(held) if isinstance(held, (list, tuple)) else ()
    return [at, *(place for key, value in items for place in paths(value, (*at, key)))]


def damaged(state: Any, path: tuple[Any, ...], value: Any, drop: bool) -> Any:
    """A copy with one thing in it replaced by ``value``, or left out."""
    if not path:
        return value
    state = list(state) if isinstance(state, tuple) else copy.copy(state)
    if len(path) == 1 and drop:
        del state[path[0]]
    else:
        state[path[0]] = damaged(state[path[0]], path[1:], value, drop)
    return state


def comparable(monitor: gfs.StabilityMonitor) -> Any:
    state = monitor.state_dict()
    state["budget"].pop("elapsed")
    return json.dumps(state, default=lambda t: t.tolist())


TENSORS = st.sampled_from([torch.ones(2, 3), torch.full((2, 3), float("nan")), torch.ones(0), torch.tensor(1j)])


@many(120)
@given(place=st.integers(0, 10_000), value=VALUES | TENSORS, drop=st.booleans(), budget=st.sampled_from([None, 0.9]))
def test_a_damaged_checkpoint_is_refused_whole_and_training_goes_on(
    place: int, value: Any, drop: bool, budget: float | None
) -> None:
    places = paths(saved())
    path = places[place % len(places)]
    training = Training(max_overhead=budget)
    before = comparable(training.monitor)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        training.monitor.load_state_dict(damaged(saved(), path, value, drop))
        if any("the saved state is damaged" in str(w.message) for w in told):
            assert comparable(training.monitor) == before
        found = training.train(3)
    assert found


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((), "state"),
        (("measuring", "signals"), "vectors"),
        (("measuring", "signals", "sharpness", "raw"), "vectors"),
        (("measuring", "learned", "fits"), "many"),
        (("journal", "run"), 3),
        (("measuring", "signals", "running"), [1, 2]),
        (("measuring", "signals", "running", "estimate", "estimates", 0, "moments"), [1.0]),
        (("measuring", "signals", "running", "estimate", "blocks"), [[0]]),
        (("budget", "spent"), {"gfs": "x"}),
        (("control", "_target"), -1.0),
        (("control", "last"), 0.0),
        (("watch", "context", "losses"), ["x"]),
        (("watch", "detectors", "rate", "rates"), [0.0]),
        (("watch", "level"), 7),
    ],
)
def test_what_is_damaged_is_said(path: tuple[Any, ...], value: Any) -> None:
    state = damaged(saved(), path, value, False)
    training = Training(max_overhead=None)
    before = comparable(training.monitor)
    with pytest.warns(gfs.GFSWarning, match="the saved state is damaged .*; measuring starts without it"):
        training.monitor.load_state_dict(state)
    assert comparable(training.monitor) == before
    with pytest.raises(gfs.ConfigError, match="the saved state is damaged"):
        Training(strict=True).monitor.load_state_dict(state)


def test_an_undamaged_checkpoint_is_loaded_without_a_word() -> None:
    training = Training(probe="fixed", probe_size=32, max_overhead=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training.monitor.load_state_dict(saved())
    state = dict(saved())
    budget, own = state.pop("budget"), training.monitor.state_dict()
    assert own.pop("budget")["prices"] == budget["prices"]
    assert json.dumps(own, default=lambda t: t.tolist()) == json.dumps(state, default=lambda t: t.tolist())
