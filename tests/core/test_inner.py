from __future__ import annotations

import pytest
import torch

from gfs_core.linalg import inner, vectors


def test_strung_together_inner_products_are_the_same() -> None:
    """The way of accelerators, on the CPU: tensors in bunches, of which one is too large for company."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (7,), (50, 30), (), (2, 2, 2)]
    x, y = ([torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes] for _ in range(2))
    x[1] = x[1].to(torch.bfloat16)
    pairs = [(x, y), (x, x), (y, y)]
    expected = inner.WHOLE.dots(pairs)
    before = vectors._BUNCH_ON_CPU
    try:
        for size, places in (
            (100, [[0, 1], [2], [3, 4]]),
            (1 << 23, [[0, 1, 2, 3, 4]]),
            (1, [[0], [1], [2], [3], [4]]),
        ):
            vectors._BUNCH_ON_CPU = size
            assert list(vectors.bunches(x)) == places
            found = torch.zeros(3, dtype=torch.float64)
            for part in places:
                found += torch.stack([d.double() for d in inner._dots_of_bunch([(_float(x), y), *pairs[1:]], part)])
            assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6)
    finally:
        vectors._BUNCH_ON_CPU = before


def test_a_vector_is_multiplied_by_tensors_and_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "_BUNCH_ON_CPU", 4)
    vector = [torch.full((n,), float(n)) for n in (1, 2, 3, 4, 5)]
    vectors.multiply((f for f in (2.0, torch.tensor([1.0, 3.0]), torch.zeros(3), torch.ones(4), 0.5)), vector)
    assert [t.tolist() for t in vector] == [[2.0], [2.0, 6.0], [0.0] * 3, [4.0] * 4, [2.5] * 5]
    with pytest.raises(ValueError, match="5 tensors, and fewer factors"):
        vectors.multiply([1.0] * 4, vector)


def _float(vector: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t.double() for t in vector]
