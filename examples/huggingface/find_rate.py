"""A learning rate that is tried out before `train`, for a small language model of English text that ships with Python.

Run: python examples/huggingface/find_rate.py
"""

from __future__ import annotations

from language_model import WIDTH, Characters
from torch.utils.data import Subset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from hf_gfs import find_rate


def main() -> None:
    set_seed(0)
    data = Characters()
    held_out = len(data) - 64
    config = GPT2Config(
        vocab_size=len(data.alphabet), n_positions=WIDTH, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    arguments = TrainingArguments(
        output_dir="find-rate",
        max_steps=400,
        per_device_train_batch_size=8,
        learning_rate=5e-5,  # the trainer's default, which is for models that are trained already
        warmup_steps=40,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    trainer = Trainer(
        GPT2LMHeadModel(config),
        arguments,
        train_dataset=Subset(data, range(held_out)),
        eval_dataset=Subset(data, range(held_out, len(data))),
    )
    found = find_rate(trainer)
    print(found)
    trainer.args.learning_rate *= found.factor
    trainer.train()
    print(f"rate {found.rate:.2g}: loss {trainer.evaluate()['eval_loss']:.3f}")


if __name__ == "__main__":
    main()
