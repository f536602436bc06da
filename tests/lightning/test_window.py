"""The micro-batches of a step: each is evaluated with its own random state, long after the step too."""

from __future__ import annotations

import io

import torch
from torch import nn

from gfs_core.loss.batches import copied, is_plain, rotating_part
from gfs_core.run.micro_batches import opened
from lightning_gfs.window import Window


def test_a_micro_batch_keeps_its_random_state_in_copies_and_checkpoints() -> None:
    window, module, drawn = Window(keeping=True), nn.Linear(2, 2), []
    torch.manual_seed(0)
    for i in range(2):
        window.keep(torch.full((6, 2), float(i)), i, module)
        drawn.append(torch.rand(3))
    kept = copied(window.batches[1])
    assert is_plain(kept)
    file = io.BytesIO()
    torch.save(kept, file)
    file.seek(0)
    for held in (window.batches[1], kept, torch.load(file, weights_only=True)):
        torch.manual_seed(1)
        batch, beside, whole = opened(held)
        assert (beside["index"], whole) == (1, True)
        assert torch.equal(batch, torch.ones(6, 2))
        assert torch.equal(torch.rand(3), drawn[1])
    torch.manual_seed(1)
    other = torch.rand(3)
    torch.manual_seed(1)
    part, beside, whole = opened(rotating_part(kept, 3, 0))
    assert (part.shape, beside["index"], whole) == ((2, 2), 1, False)
    assert torch.equal(torch.rand(3), other)  # a part goes on from where it is
