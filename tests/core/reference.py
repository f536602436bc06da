"""Slow and certain: dense Hessians in float64, and small models."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def dense_hessian(loss: Callable[[], Tensor], params: list[Tensor]) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        value = loss()
    grads = torch.autograd.grad(value, params, create_graph=True, allow_unused=True)
    flat = _flat(grads, params)
    rows = []
    for entry in flat:
        if not entry.requires_grad:
            rows.append(torch.zeros_like(flat))
            continue
        row = torch.autograd.grad(entry, params, retain_graph=True, allow_unused=True)
        rows.append(_flat(row, params))
    hessian = torch.stack(rows).detach()
    return (hessian + hessian.T) / 2


def _flat(parts: tuple[Tensor | None, ...], like: list[Tensor]) -> Tensor:
    pairs = zip(parts, like, strict=True)
    return torch.cat([(torch.zeros_like(p) if t is None else t).reshape(-1) for t, p in pairs])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.out = nn.Linear(6, 8), nn.Linear(8, 24), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.embed(x.reshape(len(x), 2, 6))).reshape(len(x), 2, 3, 2, 4).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(len(x), 2, 8)).mean(1)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 4)
        self.again = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.again(torch.tanh(self.a(x)))))


def _frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 4))
    model[0].requires_grad_(False)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 4)),
    "cnn": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3, 4)), nn.Conv2d(1, 4, 2), nn.GELU(), nn.Flatten(), nn.Linear(24, 4)
    ),
    "transformer": Attention,
    "tied": Tied,
    "frozen": _frozen,
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 12, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (20,), generator=generator)


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def trainable(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def top_eigenvalues(model: nn.Module, k: int = 1) -> list[float]:
    hessian = dense_hessian(lambda: cross_entropy(model, data()), trainable(model))
    return torch.linalg.eigvalsh(hessian).flip(0)[:k].tolist()
