"""A character language model on English text that ships with Python, trained by the Trainer with one line added.

Run:   python examples/huggingface/language_model.py
Flags: every option of the callback, and all of TrainingArguments:
       python examples/huggingface/language_model.py --max_steps 500 --gfs_every 20 --gfs_tier sharpness
Then:  tensorboard --logdir language-model
"""

from __future__ import annotations

import sys
from pydoc_data.topics import topics

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer, TrainingArguments, set_seed

from hf_gfs import GFSArguments, GFSCallback

DEFAULTS = [
    "--output_dir=language-model",
    "--max_steps=200",
    "--per_device_train_batch_size=16",
    "--learning_rate=2e-3",
    "--logging_steps=10",
    "--save_strategy=no",
    "--report_to=tensorboard",
    "--use_cpu=true",
]
WIDTH = 64


class Characters(Dataset[dict[str, torch.Tensor]]):
    def __init__(self) -> None:
        text = " ".join(topics[name] for name in sorted(topics))[:200_000]
        self.alphabet = sorted(set(text))
        numbers = {c: i for i, c in enumerate(self.alphabet)}
        self.data = torch.tensor([numbers[c] for c in text])

    def __len__(self) -> int:
        return len(self.data) // WIDTH

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        piece = self.data[i * WIDTH : (i + 1) * WIDTH]
        return {"input_ids": piece, "labels": piece}


def main() -> None:
    parser = HfArgumentParser((TrainingArguments, GFSArguments))
    arguments, gfs_arguments = parser.parse_args_into_dataclasses([*DEFAULTS, *sys.argv[1:]])
    set_seed(arguments.seed)
    data = Characters()
    config = GPT2Config(
        vocab_size=len(data.alphabet), n_positions=WIDTH, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    trainer = Trainer(model=GPT2LMHeadModel(config), args=arguments, train_dataset=data)
    trainer.add_callback(GFSCallback(gfs_arguments.config()))  # the one line
    trainer.train()


if __name__ == "__main__":
    main()
