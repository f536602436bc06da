"""Which batches can be cut into parts: the loss of the whole has to be the mean over them."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import gfs_core as gfs
from gfs_core.loss.batches import all_parts, rotating_part
from gfs_core.loss.memory import GIB
from gfs_core.loss.parts import why_whole
from tests.core.options import tuned

B, WIDTH = 48, 8
_images, _labels = load_digits(return_X_y=True)
DIGITS = torch.tensor(_images / 16, dtype=torch.float32)[:B]
LABELS = torch.tensor(_labels)[:B]
PAIR = (DIGITS, LABELS)


def dense(*middle: nn.Module, out: int = 10) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 32), *middle, nn.Linear(32, out))


def entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class Language(nn.Module):
    """Tokens in, the next ones out; a mean over those that are no padding."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed, self.drop, self.head = nn.Embedding(30, 16), nn.Dropout(dropout), nn.Linear(16, 30)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.drop(torch.tanh(self.embed(tokens))))


def next_token(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)


def text(shortest: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(30, (B, 24), generator=generator)
    lengths = torch.randint(shortest, 25, (B, 1), generator=generator)
    return {"input_ids": tokens, "labels": torch.where(torch.arange(24) < lengths, tokens.roll(-1, 1), -100)}


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(50, 16), nn.Linear(16, 10)

    def forward(self, flat: Tensor, offsets: Tensor) -> Tensor:
        return self.head(self.bag(flat, offsets))


FLAT = torch.randint(50, (B * 5,), generator=torch.Generator().manual_seed(1))
OFFSETS = torch.arange(0, B * 5, 5)


class Graph(nn.Module):
    """One convolution over the edges, a class for each node."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.second(h + torch.zeros_like(h).index_add(0, edges[1], h[edges[0]]))


EDGES = torch.randint(B, (2, 150), generator=torch.Generator().manual_seed(2))


class Recurrent(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first, self.rnn, self.head = batch_first, nn.GRU(8, 16, batch_first=batch_first), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0].select(1 if self.batch_first else 0, -1))


def contrastive(model: nn.Module, batch: Any) -> Tensor:
    a, b = (F.normalize(model(x), dim=1) for x in (batch[0], batch[0].flip(1)))
    return F.cross_entropy(a @ b.T / 0.1, torch.arange(len(a)))


def hard_triplets(model: nn.Module, batch: Any) -> Tensor:
    z, same = model(batch[0]), batch[1][:, None] == batch[1]
    apart = (z[:, None] - z).square().sum(-1)
    return F.softplus(apart.masked_fill(~same, -1e9).amax(1) - apart.masked_fill(same, 1e9).amin(1)).mean()


def preferences(model: nn.Module, batch: Any) -> Tensor:
    chosen, rejected = model(batch["input"]).squeeze(-1).chunk(2)  # halves of one tensor
    return -F.logsigmoid(chosen - rejected).mean()


def connectionist(model: nn.Module, batch: Any) -> Tensor:
    x, targets, lengths = batch  # time × batch × features
    return F.ctc_loss(model(x).log_softmax(-1), targets, torch.full_like(lengths, len(x)), lengths)


CTC = (
    torch.randn(24, B, 64, generator=torch.Generator().manual_seed(3)),
    torch.randint(1, 10, (B, 4)),
    torch.full((B,), 4),
)
NORM = nn.BatchNorm1d
KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], Any, str]] = {
    "sum": (dense, lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="sum"), PAIR, "a sum over the batch"),
    "sum over a fixed size": (
        dense,
        lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="sum") / B,
        PAIR,
        "a sum over the batch",
    ),
    "BatchNorm": (lambda: dense(NORM(32), nn.ReLU()), entropy, PAIR, "BatchNorm in training mode"),
    "BatchNorm and dropout": (lambda: dense(NORM(32), nn.Dropout(0.5)), entropy, PAIR, "BatchNorm in training mode"),
    "contrastive": (lambda: dense(nn.Tanh()), contrastive, PAIR, "compares or weights examples"),
    "contrastive with dropout": (
        lambda: dense(nn.Tanh(), nn.Dropout(0.1)),
        contrastive,
        PAIR,
        "compares or weights examples",
    ),
    "triplets": (lambda: dense(nn.Tanh()), hard_triplets, PAIR, "compares or weights examples"),
    "graph": (
        Graph,
        lambda m, b: F.cross_entropy(m(b["x"], b["e"]), b["y"]),
        {"x": DIGITS, "e": EDGES, "y": LABELS},
        "",
    ),
    "offsets": (Bags, lambda m, b: F.cross_entropy(m(*b[:2]), b[2]), (FLAT, OFFSETS, LABELS), "fails on a part"),
    "offsets first": (Bags, lambda m, b: F.cross_entropy(m(b[1], b[2]), b[0]), (LABELS, FLAT, OFFSETS), ""),
    "time first": (
        lambda: Recurrent(batch_first=False),
        lambda m, b: F.cross_entropy(m(b[0]), b[1]),
        (DIGITS.view(B, 8, 8).transpose(0, 1), LABELS),
        "",
    ),
    "time first, labels inside": (
        lambda: Recurrent(batch_first=False),
        lambda m, b: (m(b).logsumexp(1)).mean(),
        DIGITS.view(8, B, 8),
        "",
    ),
    "unequal tokens": (Language, next_token, text(1), "compares or weights examples"),
    "preferences": (lambda: dense(nn.Tanh(), out=1), preferences, {"input": DIGITS}, "compares or weights examples"),
    "connectionist": (lambda: dense(nn.Tanh()), connectionist, CTC, ""),
    "a fixed size": (dense, lambda m, b: entropy(m, (b[0].view(B, 64), b[1])), PAIR, "fails on a part (RuntimeError"),
    "the hardest few": (
        dense,
        lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none").topk(min(8, len(b[0]))).values.mean(),
        PAIR,
        "",
    ),
}
CUT: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], Any]] = {
    "mean": (lambda: dense(nn.Tanh()), entropy, PAIR),
    "squared, double": (lambda: nn.Linear(64, 3).double(), lambda m, b: m(b).square().mean(), DIGITS.double()),
    "dropout": (lambda: dense(nn.Tanh(), nn.Dropout(0.1)), entropy, PAIR),
    "heavy dropout": (lambda: dense(nn.ReLU(), nn.Dropout(0.5)), entropy, PAIR),
    "noise on the input": (dense, lambda m, b: entropy(m, (b[0] + 0.3 * torch.randn_like(b[0]), b[1])), PAIR),
    "BatchNorm as in evaluation": (lambda: dense(NORM(32), nn.ReLU()).eval(), entropy, PAIR),
    "GroupNorm": (lambda: dense(nn.GroupNorm(4, 32), nn.ReLU()), entropy, PAIR),
    "weight decay in the loss": (
        lambda: dense(nn.Tanh()),
        lambda m, b: entropy(m, b) + 0.1 * sum(p.square().sum() for p in m.parameters()),
        PAIR,
    ),
    "packed tokens": (Language, next_token, text(24)),
    "nearly equal tokens, dropout": (lambda: Language(0.1), next_token, text(22)),
    "batch-first recurrent": (lambda: Recurrent(batch_first=True), entropy, (DIGITS.view(B, 8, 8), LABELS)),
    "texts and arrays beside": (
        lambda: dense(nn.Tanh()),
        lambda m, b: F.cross_entropy(m(b["x"]), torch.tensor([int(t) for t in b["names"]])) + 0 * len(b["x"] + b["n"]),
        {"x": DIGITS, "names": [str(int(y)) for y in LABELS], "n": np.zeros((B, 1), np.float32)},
    ),
    "linear in the weights": (lambda: nn.Linear(64, 1, bias=False), lambda m, b: m(b).mean(), DIGITS),
    "at a minimum": (lambda: nn.Linear(64, 1), lambda m, b: (m(b) - m(b).detach()).square().mean(), DIGITS),
}


def found(make: Callable[[], nn.Module], loss: Callable[..., Tensor], batch: Any, seed: int, parts: int = 16) -> str:
    torch.manual_seed(seed)
    model = make()
    return why_whole(model, loss, [batch], list(model.parameters()), parts)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_mean_over_parts_is_not_cut(kind: str, seed: int) -> None:
    make, loss, batch, text_ = KINDS[kind]
    why = found(make, loss, batch, seed)
    assert why
    assert text_ in why


@pytest.mark.parametrize("parts", [2, 16])
@pytest.mark.parametrize("kind", CUT)
def test_what_is_a_mean_over_examples_is_cut(kind: str, parts: int) -> None:
    for seed in range(3):
        assert found(*CUT[kind], seed, parts) == ""


def test_several_micro_batches_are_one_whole() -> None:
    """Each micro-batch is divided by the tokens of all of them, as the Trainer of transformers does it."""
    torch.manual_seed(0)
    model, batches = Language(), [text(1), text(20)]
    counts = [int((b["labels"] != -100).sum()) for b in batches]

    def loss(_: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        share = 2 / sum(counts) if len(batch["labels"]) == B else 1 / int((batch["labels"] != -100).sum())
        return share * F.cross_entropy(
            model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten(), reduction="sum"
        )

    assert "weights examples" in why_whole(model, loss, batches, list(model.parameters()), 16)
    even = [text(24), text(24)]
    counts[:] = [B * 24, B * 24]
    assert why_whole(model, loss, even, list(model.parameters()), 16) == ""


def test_the_check_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model = dense(NORM(32), nn.Dropout(0.5))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    why_whole(model, entropy, [PAIR], list(model.parameters()), 16)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])


def test_what_has_an_entry_for_each_example_is_cut_and_nothing_else() -> None:
    batch = {
        "x": torch.arange(8), "names": list("abcdefgh"), "ids": tuple(range(8)), "array": np.arange(8),
        "few": ["a", "b"], "scalar": torch.tensor(1.0), "word": "12345678", "tensors": [torch.zeros(3)] * 8,
    }  # fmt: skip
    part = rotating_part(batch, 4, 1)
    assert part["x"].tolist() == part["array"].tolist() == list(part["ids"]) == [2, 3]
    assert part["names"] == ["c", "d"]
    assert (part["few"], part["word"], len(part["tensors"])) == (["a", "b"], "12345678", 8)
    shares = [share for _, share in all_parts([torch.arange(7), torch.arange(3)], 3)]
    assert shares == pytest.approx([1 / 7, 1 / 7, 3 / 14, 1 / 2])


def running(make: Callable[[], nn.Module], loss: Callable[..., Tensor], steps: int, state: Any = None, **options: Any):
    """A run with momentum: the examples that each evaluation saw, the measurements, the warnings, the monitor."""
    torch.manual_seed(0)
    model, sizes = make(), []
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    config = gfs.GFSConfig(**{"tier": "running", "every": 5, "max_overhead": None, **options})
    monitor = gfs.StabilityMonitor(model, optimizer, config)
    if state is not None:
        monitor.load_state_dict(state)

    def loss_of(batch: Any) -> Tensor:
        sizes.append(len(batch[0]))
        return loss(model, batch)

    seen = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            sizes.clear()
            measurement = monitor.step(loss_of, PAIR)
            seen.append(SimpleNamespace(step=step, sizes=set(sizes), measurement=measurement))
            optimizer.zero_grad()
            loss(model, PAIR).backward()
            optimizer.step()
    return seen, [str(w.message) for w in caught if issubclass(w.category, gfs.GFSWarning)], monitor


@pytest.mark.parametrize("kind", ["sum", "BatchNorm", "contrastive", "triplets"])
def test_products_on_whole_batches_with_one_sentence(kind: str) -> None:
    make, loss, _, text_ = KINDS[kind]
    seen, told, monitor = running(make, loss, 31, hvp="exact")
    measured = [s for s in seen if s.measurement is not None and s.measurement.grad_evals]
    assert measured[-1].step == 30
    assert all(s.sizes == {B} for s in measured[1:])
    assert len(told) == 1
    assert "so whole batches are measured" in told[0]
    assert text_ in told[0]
    file = io.BytesIO()
    torch.save(monitor.state_dict(), file)
    file.seek(0)
    again, told, _ = running(make, loss, 21, torch.load(file, weights_only=True), hvp="exact")
    assert all(s.sizes <= {B} for s in again)  # known: not tried again


@pytest.mark.parametrize("kind", ["sum", "BatchNorm", "contrastive"])
def test_one_gradient_is_of_whole_batches_without_a_word(kind: str) -> None:
    make, loss, _, _ = KINDS[kind]
    seen, told, _ = running(make, loss, 31)
    measured = [s for s in seen if s.measurement is not None and s.measurement.grad_evals]
    assert measured[-1].measurement.running_sharpness > 0
    assert all(s.sizes == {B} for s in measured[1:])
    assert told == []


def test_a_value_weighs_less_the_more_steps_ago_it_was_measured() -> None:
    """One weight, so the quotient is the curvature, Σx²: of twenty ones, then of twenty times 1.5."""
    model = nn.Linear(1, 1, bias=False)
    config = gfs.GFSConfig(tier="running", every=20, max_overhead=None)
    monitor = gfs.StabilityMonitor(model, torch.optim.SGD(model.parameters(), 1e-3), config)
    found = {}
    for step in range(281):
        x = torch.ones(B, 1) if step < 250 else torch.full((B, 1), 1.5**0.5)
        if (measurement := monitor.step(lambda b: 0.5 * model(b).square().sum(), x)) is not None:
            found[step] = measurement.running_sharpness
    past = 0.85**4  # of four usual intervals
    assert found[240] == pytest.approx(B, rel=1e-3)
    assert found[260] == pytest.approx(B * (past + (1 - past) * 1.5), rel=1e-3)
    assert found[280] == pytest.approx(B * (past**2 + (1 - past**2) * 1.5), rel=1e-3)


def test_a_sum_is_measured_as_it_is_trained() -> None:
    ends = {}
    for reduction in ("mean", "sum"):
        seen, _, monitor = running(
            lambda: dense(nn.Tanh()), lambda m, b, r=reduction: F.cross_entropy(m(b[0]), b[1], reduction=r), 101
        )
        ends[reduction] = seen[100].measurement.running_sharpness
        if reduction == "sum":
            exact = gfs.sharpness(
                monitor.model, lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="sum"), PAIR
            ).value
    assert ends["sum"] == pytest.approx(exact, rel=0.4)  # it has fallen meanwhile
    assert ends["sum"] > 20 * ends["mean"]


def _made() -> nn.Module:
    torch.manual_seed(0)
    return dense(nn.Tanh())


def test_an_option_that_would_cut_is_refused_in_the_same_sentence() -> None:
    make, loss, _, _ = KINDS["sum"]
    seen, told, _ = running(make, loss, 3, tier="sharpness", every=1, running_every=None, probe_size=8)
    assert [s.sizes for s in seen[1:]] == [{B}, {B}]
    assert len(told) == 1
    assert "and probe_size cannot be used" in told[0]


def test_a_batch_that_cannot_be_cut_and_does_not_fit_is_told() -> None:
    torch.manual_seed(0)
    model = dense()
    config = gfs.GFSConfig(tier="sharpness", every=1, running_every=None, probe_size=8, max_overhead=None)
    monitor = gfs.StabilityMonitor(model, torch.optim.SGD(model.parameters(), 0.1), config)
    room = [True]

    def loss_of(batch: Any) -> Tensor:
        if not room[0]:
            raise torch.OutOfMemoryError("no room")
        return KINDS["sum"][1](model, batch)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert monitor.step(loss_of, PAIR) is not None
        room[0] = False
        assert [monitor.step(loss_of, PAIR) for _ in range(3)] == [None] * 3
    assert len(caught) == 2
    assert "ran out of memory; the batch cannot be cut: it is a sum over the batch" in str(caught[1].message)


def test_it_is_tried_again_after_a_failure() -> None:
    """Batches that become others: what failed as a part is found out, and measured whole."""
    torch.manual_seed(0)
    model = dense(nn.Tanh())
    config = gfs.GFSConfig(tier="running", every=1, max_overhead=None)
    monitor = tuned(gfs.StabilityMonitor(model, torch.optim.SGD(model.parameters(), 0.1), config), parts=16)
    fixed = [False]

    def loss_of(batch: Any) -> Tensor:
        if fixed[0] and len(batch[0]) != B:
            raise ValueError("whole batches only")
        return entropy(model, batch)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert monitor.step(loss_of, PAIR) is not None
        assert monitor.step(loss_of, PAIR) is not None
        assert not caught
        fixed[0] = True
        assert monitor.step(loss_of, PAIR) is None
        later = [monitor.step(loss_of, PAIR) for _ in range(16)]
    assert any(m is not None and (m.running_sharpness or 0) > 0 for m in later)
    assert [text_ for w in caught if (text_ := str(w.message)) and "fails on a part (ValueError: whole" in text_]


SUM = KINDS["sum"][1]
WEIGHTS = sum(p.numel() for p in dense(nn.Tanh()).parameters()) * 4  # bytes of the weights
MOST = {"a dozen": (6 * WEIGHTS + 14 * (64 + 42) * 4) / GIB, "two": (6 * WEIGHTS + 2.5 * (64 + 42) * 4) / GIB}


@pytest.mark.parametrize("room", MOST)
@pytest.mark.parametrize(("loss", "found"), [(entropy, ""), (SUM, "it is a sum over the batch")])
def test_the_check_keeps_within_the_limit_on_memory(loss: Any, found: str, room: str) -> None:
    torch.manual_seed(0)
    model, done = dense(nn.Tanh()), []

    def counted(model: nn.Module, batch: Any) -> Tensor:
        out = loss(model, batch)
        done.append(len(batch[0]))
        return out

    assert why_whole(model, counted, [PAIR], list(model.parameters()), 16, max_memory=MOST[room])[: len(found)] == found
    assert max(done) == (12 if room == "a dozen" else 2)  # of 48, 24, 12 or, in the end, of 3 and 2


def test_three_examples_do_not_fit_and_two_do() -> None:
    def narrow(loss: Any) -> Any:
        def of_two(model: nn.Module, batch: Any) -> Tensor:
            if len(batch[0]) > 2:
                raise torch.OutOfMemoryError("no room")
            return loss(model, batch)

        return of_two

    torch.manual_seed(0)
    model = dense(nn.Tanh())
    three = (DIGITS[:3], LABELS[:3])
    assert why_whole(model, narrow(entropy), [three], list(model.parameters()), 16) == ""
    assert "it is a sum" in why_whole(model, narrow(SUM), [three], list(model.parameters()), 16)
    with pytest.raises(torch.OutOfMemoryError):
        why_whole(model, lambda m, b: narrow(entropy)(m, (DIGITS[:3], 0)), [three], list(model.parameters()), 16)


def test_what_could_not_be_tried_for_memory_is_told_as_that() -> None:
    torch.manual_seed(0)
    model = dense(nn.Tanh())
    config = gfs.GFSConfig(tier="running", every=1, max_overhead=None, max_memory=(7.1 * WEIGHTS) / GIB)
    monitor = tuned(gfs.StabilityMonitor(model, torch.optim.SGD(model.parameters(), 1e-3), config), parts=16)
    wide = DIGITS.repeat(1, 60).unflatten(1, (60, 64))

    def loss_of(batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]).mean(1), batch[1])

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert monitor.step(loss_of, (wide, LABELS)) is None
    texts = [str(w.message) for w in caught]
    assert any("it is not known whether the loss of a batch is the mean over its parts" in text for text in texts)
    assert any("two examples alone would keep more than `max_memory` allows" in text for text in texts)


DRAWS = """
import random, numpy, torch
from gfs_core.loss.streams import RandomState
random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
RandomState([]).shift(3)
print(random.random(), numpy.random.rand(), torch.rand(1).item())
"""


def test_every_process_draws_the_same_numbers() -> None:
    runs = [subprocess.run([sys.executable, "-c", DRAWS], capture_output=True, text=True) for _ in range(3)]
    assert len({run.stdout for run in runs}) == 1
    assert len(runs[0].stdout.split()) == 3
