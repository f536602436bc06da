from __future__ import annotations

import torch

from gfs_core.linalg import inner


def test_strung_together_inner_products_are_the_same() -> None:
    """The way of accelerators, on the CPU: tensors in bunches, of which one is too large for company."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (7,), (50, 30), (), (2, 2, 2)]
    x, y = ([torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes] for _ in range(2))
    x[1] = x[1].to(torch.bfloat16)
    pairs = [(x, y), (x, x), (y, y)]
    expected = inner.WHOLE.dots(pairs)
    before = inner._BUNCH
    try:
        for size, places in (
            (100, [[0, 1], [2], [3, 4]]),
            (1 << 23, [[0, 1, 2, 3, 4]]),
            (1, [[0], [1], [2], [3], [4]]),
        ):
            inner._BUNCH = size
            assert list(inner._bunches(x)) == places
            found = torch.zeros(3, dtype=torch.float64)
            for part in places:
                found += torch.stack([d.double() for d in inner._dots_of_bunch([(_float(x), y), *pairs[1:]], part)])
            assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6)
    finally:
        inner._BUNCH = before


def _float(vector: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t.double() for t in vector]
