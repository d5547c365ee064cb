"""``EverstepCallback`` for the Hugging Face Trainer.

    from supervisor.training.integrations.transformers import EverstepCallback

    trainer = Trainer(model=model, args=arguments, train_dataset=dataset)
    trainer.add_callback(EverstepCallback(trainer))
    trainer.train()

The model as the Trainer has wrapped it (DDP, FSDP2), optimizer, scheduler and the Trainer's own state (global step, epoch,
best metric, log history, sums of losses not yet logged, callbacks that are ExportableState) go into the Session. A step is an
optimizer step: ``global_step``.

*Where a run resumes.* The Trainer itself can pass over the data that were trained on, but only where it resumes from a
directory of its own, and it decides that before there is an optimizer that could be restored. So its ``_run_epoch``, the
one method that gets the position, is given another one on resume. Random state is restored right before the first step's
computation, when the data loader has drawn what it draws.
"""

from __future__ import annotations

import os
from typing import Any, Final, Unpack

from supervisor.errors import ConfigError, UsageError
from supervisor.training.integrations.hosted import Hosted, Options, missing
from supervisor.training.session import Session
from supervisor.training.world import say

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise missing("transformers", "transformers", error) from error

_NOWHERE: Final = os.path.join(
    os.devnull, "everstep"
)  # no directory of the Trainer's: it has no random state there
_LOSSES: Final = ("_total_loss_scalar", "_globalstep_last_logged")


class EverstepCallback(TrainerCallback):  # type: ignore[misc]
    """Keeps the state of ``trainer.train()``, and resumes it.

    The Trainer's own checkpoints (``save_strategy``) are not written while this one keeps the state, unless ``own_saves`` is
    set or the Trainer is to load its best one at the end.

    Args:
        trainer: The one that it is added to.
        own_saves: Whether the Trainer also writes checkpoints of its own.
        options: Those of Session: ``dir``, ``checkpoint_every``, ``keep_last``, ``keep_every``, ``keep_best``.

    Raises:
        ConfigError: a version of transformers whose Trainer cannot be resumed like this.
        UsageError: an option that is not understood; (training begins) ``resume_from_checkpoint`` is given.
    """

    def __init__(self, trainer: Trainer, *, own_saves: bool = False, **options: Unpack[Options]) -> None:
        if not hasattr(trainer, "_run_epoch"):
            raise ConfigError("this Trainer has no _run_epoch: transformers 5.0 or newer is required")
        self._trainer = trainer
        self._own_saves = own_saves or trainer.args.load_best_model_at_end
        self._hosted = Hosted(options)
        self._run_epoch = trainer._run_epoch
        trainer._run_epoch = self._run_epoch_from_here
        self._resumed_at: int | None = None

    @property
    def session(self) -> Session:
        """The Session, while the Trainer trains. Raises UsageError at other times."""
        return self._hosted.session

    # ------------------------------------------------------------------ training begins and ends

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Enter the Session: resume, if there is something to resume from."""
        trainer = self._trainer
        if state.global_step:
            raise UsageError(
                "resume_from_checkpoint and everstep cannot both say where to resume: leave the former out"
            )
        objects: dict[str, Any] = {
            "model": trainer.model_wrapped,
            "optimizer": getattr(trainer.optimizer, "optimizer", trainer.optimizer),  # Accelerate's wrapper
            "scheduler": trainer.lr_scheduler,
            "trainer": _TrainerState(trainer),
        }
        if (scaler := getattr(trainer.accelerator, "scaler", None)) is not None:
            objects["scaler"] = scaler
        session = self._hosted.enter({}, **objects)
        self._resumed_at = session.step if session.resumed else None
        if args.save_strategy != "no" and not self._own_saves and state.is_world_process_zero:
            say(
                "the Trainer's own checkpoints are not written: everstep keeps the state (own_saves=True: both)"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The training is complete, or was stopped by a callback: save its end."""
        if self._hosted.is_open:
            self._hosted.leave()

    def _run_epoch_from_here(self, *, epoch: int, **position: Any) -> None:
        """``Trainer._run_epoch``: on resume, of the epoch resumed in, from the first batch that was not trained on."""
        if self._resumed_at is not None:
            trainer, each = self._trainer, int(position["num_update_steps_per_epoch"])
            resumed_in, steps = divmod(self._resumed_at, each)
            if epoch < resumed_in or self._resumed_at >= trainer.state.max_steps:
                return
            loader = position["train_dataloader"]
            sampler = loader.get_sampler() if hasattr(loader, "get_sampler") else None
            if sampler is not None and hasattr(
                sampler, "set_epoch"
            ):  # the loader that passes batches over does not hand it on
                sampler.set_epoch(epoch)
            self._resumed_at = None
            position |= {
                "epochs_trained": epoch, "resume_from_checkpoint": _NOWHERE,
                "steps_trained_in_current_epoch": steps * trainer.args.gradient_accumulation_steps,
            }  # fmt: skip
        try:
            self._run_epoch(epoch=epoch, **position)
        except BaseException as error:
            self._hosted.abandon(error)
            raise

    # ------------------------------------------------------------------ steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step before ends, with what was logged, evaluated and saved after it; the next begins."""
        self._hosted.evaluate(on=False)
        self._hosted.begin(state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer has stepped."""
        self._hosted.done()
        self._keep_from_saving(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer would save here, too; and after the last epoch it may load the best weights: save the last before."""
        self._keep_from_saving(control)
        over = control.should_training_stop or state.global_step >= state.max_steps
        if over and args.load_best_model_at_end:
            self._hosted.leave()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Metrics for the status, and for ``keep_best``."""
        if self._hosted.is_open and logs:
            self.session.log(
                **{name: value for name, value in logs.items() if isinstance(value, (int, float))}
            )

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An evaluation is going on: it has other hang limits."""
        if self._hosted.is_open:
            self._hosted.evaluate(on=True)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """It is over."""
        self._hosted.evaluate(on=False)

    def _keep_from_saving(self, control: Any) -> None:
        if not self._own_saves:
            control.should_save = False


class _TrainerState:
    """What the Trainer knows of itself, as a Stateful."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """Plain values only."""
        trainer = self._trainer
        known = {
            name: value
            for name, value in vars(trainer.state).items()
            if name not in ("stateful_callbacks", "is_local_process_zero", "is_world_process_zero")
        }
        return {
            "state": {**known, "log_history": [dict(entry) for entry in trainer.state.log_history]},
            "losses": {name: getattr(trainer, name) for name in _LOSSES}
            | {"_tr_loss": float(trainer._tr_loss)},
            "flos": float(trainer.current_flos),
            "callbacks": {name: one.state()["attributes"] for name, one in self._callbacks()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back; how far the run is to go (``max_steps``) is what it was given now."""
        trainer = self._trainer
        given = (
            "max_steps",
            "num_train_epochs",
            "logging_steps",
            "eval_steps",
            "save_steps",
            "train_batch_size",
        )
        for name, value in state["state"].items():
            if name not in given:
                setattr(trainer.state, name, value)
        for name in _LOSSES:
            setattr(trainer, name, state["losses"][name])
        trainer._tr_loss.fill_(state["losses"]["_tr_loss"])
        trainer.current_flos = state["flos"]
        for name, one in self._callbacks():
            for attribute, value in state["callbacks"].get(name, {}).items():
                setattr(one, attribute, value)

    def _callbacks(self) -> list[tuple[str, Any]]:
        found = [one for one in self._trainer.callback_handler.callbacks if isinstance(one, ExportableState)]
        return [(f"{index}:{type(one).__name__}", one) for index, one in enumerate(found)]
