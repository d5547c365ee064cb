"""Trainer.train() with EverstepCallback, then the same without anything of everstep. DDP under torchrun."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from supervisor.training.integrations.transformers import EverstepCallback
from tests.trainers.programs import striking


class Numbers(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 42

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, 32, (9,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


class Strike(TrainerCallback):  # type: ignore[misc]
    def __init__(self, everstep: EverstepCallback) -> None:
        self.everstep = everstep

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        striking.strike(self.everstep.session)


def train(everstep: bool) -> dict[str, object]:
    arguments = TrainingArguments(
        str(striking.OUT / "trainer"), num_train_epochs=3, per_device_train_batch_size=2, logging_steps=3,
        gradient_accumulation_steps=2, learning_rate=1e-2, lr_scheduler_type="cosine", warmup_steps=3, seed=5,
        eval_strategy="epoch", save_strategy="steps", save_steps=4, report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    trainer = Trainer(model, arguments, train_dataset=Numbers(), eval_dataset=Numbers())
    if everstep:
        ours = EverstepCallback(trainer)
        trainer.add_callback(Strike(ours))
        trainer.add_callback(ours)
    else:
        trainer.args.save_strategy = "no"
    trainer.train()
    timed = ("runtime", "per_second")
    history = [
        {name: value for name, value in entry.items() if not name.endswith(timed)}
        for entry in trainer.state.log_history
        if "train_runtime" not in entry
    ]
    return {
        "weights": striking.digest(model.state_dict().values()),
        "history": history,
        "steps": trainer.state.global_step,
        "saved": sorted(path.name for path in striking.OUT.glob("trainer/checkpoint-*")),
    }


if __name__ == "__main__":
    kept = train(everstep=True)
    striking.tell(kept=kept, plain=train(everstep=False))
