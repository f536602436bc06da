"""Models made as large ones are: checkpointed, compiled, tied, on frozen or quantised bases, placed by accelerate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    """Six numbers as two tokens, attention between them, three logits."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.embed, self.qkv, self.out = nn.Linear(3, 8), nn.Linear(8, 24), nn.Linear(8, 3)
        self.reentrant = reentrant

    def mix(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(h).reshape(len(h), 2, 3, 2, 4).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return mixed.transpose(1, 2).reshape(len(h), 2, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.reshape(len(x), 2, 3))
        mixed = self.mix(h) if self.reentrant is None else checkpoint(self.mix, h, use_reentrant=self.reentrant)
        return self.out(torch.tanh(mixed)).mean(1)


class Tied(nn.Module):
    """One layer used twice, and its transpose as the way out."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.b(torch.tanh(self.a(x))))
        return nn.functional.linear(h, self.a.weight.T)[:, :3]


class Quantised(nn.Module):
    """A linear layer of 8-bit integers, frozen, with a trainable low-rank part beside it."""

    def __init__(self, wide: int, high: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-127, 128, (high, wide), dtype=torch.int8))
        self.down, self.up = nn.Linear(wide, 2, bias=False), nn.Linear(2, high, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.to(x.dtype) / 200).T + self.up(self.down(x))


def _made(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return build().double()

    return make


def _compiled() -> nn.Module:
    model = Block()
    model.compile(backend="aot_eager")
    return model


def _frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    model[0].requires_grad_(False)
    return model


def _placed() -> nn.Module:
    model = Block()
    return dispatch_model(model, {"embed": "cpu", "qkv": "cpu", "out": "cpu"}, main_device="cpu", force_hooks=True)


MADE: dict[str, Callable[[], nn.Module]] = {
    "attention": _made(Block),
    "checkpointed": _made(lambda: Block(False)),
    "re-entrant": _made(lambda: Block(True)),
    "compiled": _made(_compiled),
    "tied": _made(Tied),
    "frozen": _made(_frozen),
    "quantised": _made(lambda: nn.Sequential(Quantised(6, 12), nn.Tanh(), nn.Linear(12, 3))),
    "placed": _made(_placed),
}
