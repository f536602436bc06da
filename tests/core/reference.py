"""Slow and certain: dense Hessians in float64, and small models."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def dense_hessian(loss: Callable[[], Tensor], params: list[Tensor], together: bool = True) -> Tensor:
    """The rows together, by ``vmap``; or one after the other, where it has no rule for an operation."""
    with sdpa_kernel(SDPBackend.MATH):
        value = loss()
    grads = torch.autograd.grad(value, params, create_graph=True, allow_unused=True)
    flat = torch.cat(
        [g.reshape(-1) if g is not None else torch.zeros_like(p).reshape(-1) for g, p in _pairs(grads, params)]
    )
    units = torch.eye(len(flat), dtype=flat.dtype)
    if not flat.requires_grad:
        return torch.zeros_like(units)

    def products(of: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(
            flat, params, of, retain_graph=True, allow_unused=True, is_grads_batched=of.dim() == 2
        )
        shape = (*of.shape[:-1], -1)
        return [
            of.new_zeros(*of.shape[:-1], p.numel()) if h is None else h.reshape(shape) for h, p in _pairs(found, params)
        ]

    hessian = (
        torch.cat(products(units), 1)
        if together
        else torch.stack([torch.cat(products(unit.clone())) for unit in units])
    )
    return (hessian + hessian.T).detach() / 2


def _pairs(parts: tuple[Tensor | None, ...], params: list[Tensor]) -> list[tuple[Tensor | None, Tensor]]:
    return list(zip(parts, params, strict=True))


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
