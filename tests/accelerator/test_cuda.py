"""What only a GPU shows. Skipped without one; on a GPU: pytest tests/accelerator."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import gfs_core as gfs
from gfs_core.loss.learned import Learned
from tests.bitwise import assert_same
from tests.core.options import tuned, tuned_callback

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ALWAYS: dict[str, Any] = {"every": 2, "max_overhead": None, "tier": "gfs", "alarm": "log"}
TUNED: dict[str, Any] = {"beside": {"directional": 2}}
Batch = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def net(dropout: float = 0.2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Dropout(dropout), nn.Linear(64, 64), nn.Tanh(),
        nn.Linear(64, 3),
    )  # fmt: skip


def examples(step: int, count: int = 64, dtype: torch.dtype = torch.float32, device: str = "cuda") -> Batch:
    x = torch.randn(count, 12, generator=torch.Generator().manual_seed(step))
    return x.to(device, dtype), ((x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 0).long()).to(device)


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])


def monitored(
    model: nn.Module, optimizer: torch.optim.Optimizer, how: dict[str, Any] = TUNED, **options: Any
) -> gfs.StabilityMonitor:
    return tuned(gfs.StabilityMonitor(model, optimizer, gfs.GFSConfig(**(ALWAYS | options))), **how)


@pytest.mark.parametrize("hvp", ["exact", "gradients"])
def test_values_are_those_of_the_cpu(hvp) -> None:
    found = []
    for device in ("cpu", "cuda"):
        model, batch = net(0.0).double().to(device), examples(0, dtype=torch.float64, device=device)
        options: dict[str, Any] = {"tol": 1e-6 if hvp == "exact" else 1e-4, "hvp": hvp}
        flowed = gfs.gfs_sharpness(model, loss_fn, batch, horizon=16, learning_rate=0.1, rtol=1e-4, **options)
        found.append((gfs.sharpness(model, loss_fn, batch, **options).value, flowed.sharpness, flowed.loss))
    assert found[1] == pytest.approx(found[0], rel=1e-6 if hvp == "exact" else 3e-3)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.RAdam])
def test_the_scale_of_an_optimizer_is_that_on_the_cpu(kind) -> None:
    found = []
    for device in ("cpu", "cuda"):
        model = net(0.0).double().to(device)
        optimizer = kind(model.parameters(), 0.01)
        for step in range(3):
            optimizer.zero_grad()
            loss_fn(model, examples(step, dtype=torch.float64, device=device)).backward()
            model[0].weight.grad[0] = 0.0  # a unit that is off
            optimizer.step()
        found.append([s.cpu() for s in gfs.stability_of(optimizer, list(model.parameters())).scale])
    assert not found[0][0][0].any()
    assert all(torch.allclose(a, b, rtol=1e-9, atol=0) for a, b in zip(*found, strict=True))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adamw, fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "adamw, capturable": lambda p: torch.optim.AdamW(p, torch.tensor(0.01, device="cuda"), capturable=True),
}
AUTOCASTS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("precision", AUTOCASTS)
def test_training_is_bitwise_the_same_with_dropout_and_gradient_scaling(kind, precision) -> None:
    """The random state of the GPU is put back as well."""
    dtype = AUTOCASTS[precision]

    def train(measure: bool) -> tuple[dict[str, Any], list[gfs.Measurement]]:
        model = net().cuda()
        optimizer = OPTIMIZERS[kind](model.parameters())
        monitor, found = monitored(model, optimizer) if measure else None, []
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, enabled=dtype is torch.float16)

        def loss(batch: Batch) -> Tensor:
            with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
                out = model(batch[0])
            return nn.functional.cross_entropy(out.float(), batch[1])

        for step in range(8):
            optimizer.zero_grad()
            value = loss(examples(step))
            scaler.scale(value).backward()
            if monitor is not None and (m := monitor.step(loss, examples(step), step, loss=value.detach())):
                found.append(m)
            scaler.step(optimizer)
            scaler.update()
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.rand(3).cuda()}, found

    measured, found = train(True)
    assert_same(measured, train(False)[0])
    solved = [m for m in found if m.sharpness is not None]
    assert len(solved) == 4
    assert all(m.stability_ratio > 0 and m.gfs_sharpness is not None for m in solved[1:])
    assert (solved[0].precision_error is not None) == (dtype is torch.bfloat16)


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION])
def test_fast_attention_is_measured_exactly_or_from_gradients(backend) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.qkv, self.out = nn.Linear(12, 3 * 64), nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x.reshape(8, 8, 12)).reshape(8, 8, 3, 2, 32).permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(mixed.transpose(1, 2).reshape(64, 64))

    torch.use_deterministic_algorithms(False)  # the backward passes of these kernels are not
    model, seen = Attention().cuda(), []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with sdpa_kernel([backend, SDPBackend.MATH]), torch.autocast("cuda", torch.bfloat16):
            out = model(batch[0])
        seen.append(type(out.grad_fn).__name__)
        return nn.functional.cross_entropy(out.float(), batch[1])

    true = gfs.sharpness(copy.deepcopy(model).double(), loss_fn, examples(0, dtype=torch.float64), tol=1e-6).value
    found = gfs.sharpness(model, loss, examples(0), tol=1e-3)
    assert found.value == pytest.approx(true, rel=0.03)
    found = gfs.sharpness(model, loss, examples(0), tol=1e-2, hvp="gradients")
    assert found.value == pytest.approx(true, rel=0.05)
    with sdpa_kernel(backend), torch.autocast("cuda", torch.bfloat16):  # it does run with that kernel alone
        assert math.isfinite(float(model(examples(0)[0]).sum().detach()))


def test_a_compiled_model_with_cuda_graphs() -> None:
    def train(measure: bool) -> tuple[list[Tensor], list[gfs.Measurement]]:
        torch._dynamo.reset()
        model = net(0.0).cuda()
        run = torch.compile(model, mode="reduce-overhead")
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        monitor, found = monitored(model, optimizer) if measure else None, []
        for step in range(8):
            torch.compiler.cudagraph_mark_step_begin()
            optimizer.zero_grad()
            batch = examples(step)
            loss_fn(run, batch).backward()
            if monitor is not None and (m := monitor.step(lambda b: loss_fn(run, b), batch, step)):
                found.append(m)
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()], found

    measured, found = train(True)
    assert all(torch.equal(a, b) for a, b in zip(measured, train(False)[0], strict=True))
    assert sum(m.sharpness is not None for m in found) == 4


def test_a_step_captured_in_a_cuda_graph_is_replayed_as_it_is() -> None:
    def train(measure: bool) -> tuple[list[Tensor], list[float]]:
        model = net(0.0).cuda()
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        held = examples(0)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                optimizer.zero_grad()
                loss_fn(model, held).backward()
                optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        optimizer.zero_grad()
        with torch.cuda.graph(graph):
            loss_fn(model, held).backward()
            optimizer.step()
        monitor, found = monitored(model, optimizer) if measure else None, []
        for step in range(8):
            for kept, new in zip(held, examples(step), strict=True):
                kept.copy_(new)
            graph.replay()
            if monitor is not None and (m := monitor.step(lambda b: loss_fn(model, b), held, step)):
                found.append(m.sharpness)
        return [p.detach().clone() for p in model.parameters()], found

    measured, found = train(True)
    assert all(torch.equal(a, b) for a, b in zip(measured, train(False)[0], strict=True))
    assert sum(v is not None and v > 0 for v in found) == 4


def test_running_out_of_memory_is_met_by_fewer_examples() -> None:
    model = nn.Sequential(nn.Linear(12, 4096), nn.GELU(), nn.Linear(4096, 3)).cuda()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = monitored(model, optimizer, {}, every=1, tier="sharpness", running_every=None)
    before = copy.deepcopy(model.state_dict())
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 0.7e9) / whole)
    batch = examples(0, 2**15)
    with pytest.warns(gfs.GFSWarning, match="ran out of memory; the next one is on half as many examples"):
        found = [monitor.step(lambda b: loss_fn(model, b), batch) for _ in range(8)]
    assert found[0] is None
    assert found[-1] is not None
    assert found[-1].sharpness > 0
    assert_same(before, model.state_dict())
    assert torch.cuda.memory_allocated() < 0.3e9


def test_a_product_waits_for_the_gpu_as_often_as_the_docs_say() -> None:
    """Once: to see that the product is finite."""
    model, batch = net(0.0).cuda(), examples(0)
    hessian = gfs.Hessian(gfs.Objective(model, loss_fn, [batch]), "exact", Learned(double_backward_verified=True))
    vector = [torch.ones_like(p) for p in model.parameters()]
    hessian(vector)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            again = hessian(vector)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ["synchronizing" in str(w.message) for w in told] == [True]
    assert float(sum(t.square().sum() for t in again)) > 0


def test_lightning_in_mixed_precision_on_a_gpu(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    from lightning_gfs import GFSCallback

    class Net(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]).float(), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    x, y = examples(0, 512, device="cpu")
    data = torch.utils.data.TensorDataset(x, y)

    def train(kind: str, measure: bool) -> tuple[dict[str, Tensor], list[gfs.Measurement]]:
        torch.manual_seed(1)
        model, history = Net(), tmp_path / kind
        options = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        callbacks = [tuned_callback(GFSCallback(**ALWAYS, history=str(history)), **TUNED)] if measure else []
        trainer = lightning.Trainer(
            accelerator="gpu", devices=1, precision=kind, max_steps=8, callbacks=callbacks, default_root_dir=tmp_path,
            enable_checkpointing=False, **options,
        )  # fmt: skip
        trainer.fit(model, torch.utils.data.DataLoader(data, 64))
        return model.state_dict(), gfs.read_history(history) if measure else []

    for kind in ("32-true", "16-mixed", "bf16-mixed"):
        measured, found = train(kind, True)
        assert_same(measured, train(kind, False)[0])
        assert sum(m.sharpness is not None for m in found) == 4, kind


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_the_trainer_in_mixed_precision_on_a_gpu(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    from hf_gfs import GFSCallback

    torch.use_deterministic_algorithms(False)

    def train(measure: bool) -> tuple[dict[str, Tensor], list[gfs.Measurement]]:
        transformers.set_seed(0)
        sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
        rows = torch.randint(64, (64, 16), generator=torch.Generator().manual_seed(0))
        data = [{"input_ids": r, "labels": r} for r in rows]
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "out"), max_steps=8, per_device_train_batch_size=8, save_strategy="no",
            report_to=[], disable_tqdm=True, **{kind: True}, full_determinism=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=data)
        if measure:
            trainer.add_callback(tuned_callback(GFSCallback(**ALWAYS, history=str(tmp_path / "history")), **TUNED))
        trainer.train()
        assert next(model.parameters()).is_cuda
        return model.state_dict(), gfs.read_history(tmp_path / "history") if measure else []

    measured, found = train(True)
    assert_same(measured, train(False)[0])
    assert sum(m.sharpness is not None for m in found) == 4


@pytest.mark.parametrize("engine", ["DDP", "FSDP2"])
def test_nccl(tmp_path: Path, engine: str) -> None:
    """One process alone: the calls are NCCL's own, though nothing travels."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    distributed.init_process_group("nccl", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = net(0.0).cuda()
        del model[1]  # BatchNorm
        like = copy.deepcopy(model)
        wrapped = DistributedDataParallel(model, [0]) if engine == "DDP" else fully_shard(model)
        found = []
        for each in (wrapped, like):
            optimizer = torch.optim.SGD(each.parameters(), 0.1)
            monitor = monitored(each, optimizer, TUNED | {"tol": 1e-3}, every=1, tier="sharpness")
            batch = examples(0)
            loss_fn(each, batch).backward()
            found.append(monitor.step(lambda b, m=each: loss_fn(m, b), batch, 0))
    finally:
        distributed.destroy_process_group()
    assert found[0].sharpness == pytest.approx(found[1].sharpness, rel=2e-3)


def test_a_checkpoint_of_a_gpu_run_goes_on_where_it_was() -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer, gfs.StabilityMonitor]:
        model = net(0.0).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        return model, optimizer, monitored(model, optimizer, probe="fixed", seed=3)

    def go(parts, steps: range) -> list[gfs.Measurement]:
        model, optimizer, monitor = parts
        found = []
        for step in steps:
            optimizer.zero_grad()
            loss_fn(model, examples(step)).backward()
            found.append(monitor.step(lambda b: loss_fn(model, b), examples(step), step))
            optimizer.step()
        return [m for m in found if m is not None]

    whole = start()
    go(whole, range(5))
    saved = copy.deepcopy([part.state_dict() for part in whole])
    expected = go(whole, range(5, 10))
    resumed = start()
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    again = go(resumed, range(5, 10))
    assert [m.sharpness for m in again] == [m.sharpness for m in expected]
    assert [m.gfs_sharpness for m in again] == [m.gfs_sharpness for m in expected]


_RECURRENT = """
import sys, torch, gfs_core as gfs
from torch import nn
torch.manual_seed(0)
layers, head = nn.LSTM(3, 16, 2, batch_first=True, dropout=0.3).cuda(), nn.Linear(16, 3).cuda()
model = nn.ModuleList([layers, head])
optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
def loss(batch):
    return nn.functional.cross_entropy(head(layers(batch[0])[0][:, -1]), batch[1])
options = dict(tier="sharpness", every=2, running_every=None, max_overhead=None)
monitor = gfs.StabilityMonitor(model, optimizer, gfs.GFSConfig(**options)) if sys.argv[1] == "measured" else None
found = []
for step in range(8):
    x = torch.randn(16, 4, 3, generator=torch.Generator().manual_seed(step)).cuda()
    batch = x, (x.sum((1, 2)) > 0).long()
    if monitor is not None and (m := monitor.step(loss, batch, step)):
        found.append(m.sharpness)
    optimizer.zero_grad()
    loss(batch).backward()
    optimizer.step()
assert monitor is None or None not in found, found
print(float(sum(p.double().square().sum() for p in model.parameters())).hex())
"""


def test_the_dropout_of_recurrent_layers_is_left_to_training() -> None:
    """In processes of their own: cuDNN's stream goes on from one training to the next."""
    runs = [
        subprocess.run([sys.executable, "-c", _RECURRENT, kind], capture_output=True, text=True)
        for kind in ("plain", "measured")
    ]
    assert [r.returncode for r in runs] == [0, 0], runs[1].stderr
    assert runs[0].stdout == runs[1].stdout


@pytest.mark.parametrize("backend", [SDPBackend.EFFICIENT_ATTENTION])
def test_dropout_inside_attention_is_measured_exactly(backend) -> None:
    """The plain kernel draws other numbers than the fused one; that is no missing derivative."""
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(32, 4, 64, 0.1, batch_first=True).cuda()
    x = torch.randn(32, 4, 32, generator=torch.Generator().manual_seed(1)).cuda()

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        with sdpa_kernel([backend, SDPBackend.MATH]):
            return model(batch).tanh().sum(-1).square().mean()

    with warnings.catch_warnings():
        warnings.simplefilter("error", gfs.GFSWarning)
        found = gfs.sharpness(model, loss, x, tol=1e-3)
    assert found.converged


def watched(device: str, precision: torch.dtype, compiled: bool = False) -> tuple[list[gfs.Measurement], Learned]:
    """The running estimate along a training, by one gradient a product, and what the run has learned."""
    model = net(0.0).to(device)
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, fused=True)
    monitor = gfs.StabilityMonitor(
        run, optimizer, gfs.GFSConfig(tier="sharpness", every=8, running_every=1, max_overhead=None, alarm="off")
    )
    monitor.measuring.learned.whole_cheaper = True

    def loss_of(batch: Batch) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=precision is torch.bfloat16):
            return loss_fn(run, batch)

    found = []
    for step in range(40):
        batch = examples(step, 256, device=device)
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        measurement = monitor.step(loss_of, batch, loss=loss.detach())
        found += [] if measurement is None else [measurement]
        optimizer.step()
    return found, monitor.measuring.learned


def test_one_gradient_gives_the_running_ratio_of_the_cpu() -> None:
    ratios = {}
    for device, precision, compiled in (
        ("cpu", torch.float32, False),
        ("cuda", torch.float32, False),
        ("cuda", torch.bfloat16, False),
        ("cuda", torch.float32, True),
    ):
        found, learned = watched(device, precision, compiled)
        ratios[device, precision, compiled] = found[-1].running_stability_ratio
        assert (learned.of_step, learned.smooth) == ("mean", True)
        assert found[-2].grad_evals == 1
    base = ratios["cpu", torch.float32, False]
    assert ratios["cuda", torch.float32, False] == pytest.approx(base, rel=0.02)
    assert ratios["cuda", torch.float32, True] == pytest.approx(base, rel=0.02)
    assert ratios["cuda", torch.bfloat16, False] == pytest.approx(base, rel=0.15)


def test_the_way_of_a_solve_is_timed_once_and_its_values_are_right() -> None:
    found, learned = watched("cuda", torch.float32)
    assert learned.solve_by_gradients is not None
    solved = [m for m in found if m.sharpness is not None]
    exact, _ = watched("cpu", torch.float32)
    for here, there in zip(solved, (m for m in exact if m.sharpness is not None), strict=True):
        assert here.sharpness == pytest.approx(there.sharpness, rel=0.05)


@pytest.mark.parametrize("kind", ["adamw", "fused", "capturable"])
def test_a_step_is_skipped_and_a_rollback_puts_back_to_the_bit(kind: str) -> None:
    model = net(dropout=0.0).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=kind == "fused", capturable=kind == "capturable")
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=1000)
    monitor = monitored(model, optimizer, alarm="rescue", tier="running")
    monitor.protect(scaler)

    def kept() -> Any:
        return copy.deepcopy([dict(model.named_parameters()), [optimizer.state[p] for p in model.parameters()]])

    states, said = [], []
    for step in range(70):
        states.append(kept() if step else None)
        if step == 60:
            model[0].weight.data.fill_(math.nan)
        with torch.autocast("cuda", torch.float16):
            loss = loss_fn(model, examples(step))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        told = math.inf if step == 20 else loss  # as of a batch whose loss alone shows that it is bad
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = monitor.step(lambda b: loss_fn(model, b), examples(step), loss=told)
        said.append("" if made is None else "; ".join(made.reasons))
        scaler.step(optimizer)
        scaler.update()
        if step == 20:
            assert scaler.get_scale() == 2.0**10
    assert "the step was skipped" in said[20]
    assert_same(states[21], states[20])
    assert "went back at step 63 to the weights of step 50" in said[63]
    assert_same(states[64], states[50])
    assert all(p.is_cuda and p.isfinite().all() for p in model.parameters())
    monitor.close()
