"""A character language model on English text that ships with Python, trained by Lightning with one line added.

Run:  python examples/lightning/language_model.py
Then: tensorboard --logdir lightning_logs
"""

from __future__ import annotations

from pydoc_data.topics import topics

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gfs import GFSCallback

WIDTH = 64


class Characters(L.LightningModule):
    def __init__(self, letters: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(letters, 64)
        self.place = nn.Parameter(0.02 * torch.randn(WIDTH - 1, 64))
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.1, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, letters)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(WIDTH - 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        hidden = self.blocks(self.embed(batch[:, :-1]) + self.place, mask=self.mask, is_causal=True)
        loss = nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), batch[:, 1:].flatten())
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main() -> None:
    L.seed_everything(0)
    text = " ".join(topics[name] for name in sorted(topics))[:200_000]
    alphabet = sorted(set(text))
    numbers = {c: i for i, c in enumerate(alphabet)}
    data = torch.tensor([numbers[c] for c in text])
    pieces = list(data[: len(data) // WIDTH * WIDTH].reshape(-1, WIDTH))
    trainer = L.Trainer(
        max_steps=200,
        accelerator="cpu",
        gradient_clip_val=1.0,
        log_every_n_steps=10,
        callbacks=[GFSCallback(progress_bar=True)],  # the one line
    )
    trainer.fit(Characters(len(alphabet)), DataLoader(pieces, batch_size=16, shuffle=True))


if __name__ == "__main__":
    main()
