"""An A/B test: the same training at a rate that is too high, with and without control, five seeds each.

Run:  python examples/lightning/ab_test.py
Then: gfs compare runs/plain runs/cap --out compare.html
"""

from __future__ import annotations

import logging
import sys
import warnings

import lightning as L
from digits import Digits, DigitsData
from lightning.pytorch.loggers import CSVLogger

from lightning_gfs import GFSCallback


def train(name: str, seed: int, callbacks: list[L.Callback]) -> None:
    L.seed_everything(seed, verbose=False)
    trainer = L.Trainer(
        max_steps=100,
        accelerator="cpu",
        logger=CSVLogger("runs", name=name, version=f"seed-{seed}"),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    trainer.fit(Digits(lr=0.1), DigitsData())  # fifty times the usual rate


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    for seed in range(int(sys.argv[1]) if len(sys.argv) > 1 else 5):
        train("plain", seed, [])
        train("cap", seed, [GFSCallback(tier="running", every=5, control="cap")])
        print(f"seed {seed}: done", flush=True)


if __name__ == "__main__":
    main()
