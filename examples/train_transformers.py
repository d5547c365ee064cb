"""The Hugging Face Trainer and a tiny GPT-2, made from a configuration (nothing is downloaded), learn to count. DDP.

everstep run torchrun --nproc-per-node=2 examples/train_transformers.py
torchrun --nproc-per-node=2 examples/train_transformers.py    # works as well: nothing is saved then
"""

from __future__ import annotations

import argparse
import os
import tempfile

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from supervisor.training.integrations.transformers import EverstepCallback  # everstep

VOCABULARY, CONTEXT = 64, 32


class Counting(Dataset[dict[str, torch.Tensor]]):
    """Sequences that count up from somewhere by something, modulo the vocabulary; each follows from its index."""

    def __len__(self) -> int:
        return 2048

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (index + torch.arange(CONTEXT) * (1 + index % 7)) % VOCABULARY
        return {"input_ids": tokens, "labels": tokens}


def main() -> None:
    """Read the arguments, train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()

    torch.manual_seed(0)  # the same weights on every rank
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=64, n_layer=2, n_head=4, **tokens)
    )
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model,
            TrainingArguments(
                scratch, num_train_epochs=arguments.epochs, per_device_train_batch_size=16, learning_rate=1e-3,
                logging_steps=20, save_strategy="no", report_to="none", disable_tqdm=True,
            ),
            train_dataset=Counting(),
        )  # fmt: skip
        trainer.add_callback(EverstepCallback(trainer))  # everstep
        trainer.train()
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"finished after {trainer.state.global_step} steps", flush=True)


if __name__ == "__main__":
    main()
