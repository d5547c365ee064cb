"""``EverstepCallback`` for Lightning.

    from supervisor.training.integrations.lightning import EverstepCallback

    trainer = Trainer(max_epochs=10, callbacks=[EverstepCallback()], enable_checkpointing=False)
    trainer.fit(model, loader)

The module as the strategy has wrapped it (DDP, FSDP2), its optimizers and schedulers, the progress of Lightning's loops and
the states of callbacks, data module and precision plugin go into the Session. A step is an optimizer step.

*Where a run resumes.* Lightning's loops can go on in the middle of an epoch, but they leave it to the data loader to know
where that is. Here the epoch's data are iterated again up to the batch, with the random state that the epoch began with, so any
loader will do. Averages over an epoch that Lightning logs are those of the rest of the epoch: it does not keep its sums.

*Signals.* A supervisor answers them, so Lightning's own handlers are taken away while it trains: they would end a rank in the
middle of a step (SIGTERM), or save and requeue the job beside everstep (SIGUSR1 under SLURM).
"""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Mapping
from typing import Any, Final, Unpack

import torch

from supervisor.edge.link import current
from supervisor.training import rng
from supervisor.training.integrations.hosted import Hosted, Options, missing
from supervisor.training.session import Session

try:
    from lightning.pytorch import Callback
    from lightning.pytorch.plugins.environments import SLURMEnvironment
except ImportError as error:
    raise missing("lightning", "lightning", error) from error

_SIGNALS: Final = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)


class EverstepCallback(Callback):  # type: ignore[misc]
    """Keeps the state of ``trainer.fit``, and resumes it.

    Args:
        options: Those of Session: ``dir``, ``checkpoint_every``, ``keep_last``, ``keep_every``, ``keep_best``.

    Raises:
        UsageError: an option that is not understood.
    """

    def __init__(self, **options: Unpack[Options]) -> None:
        self._hosted = Hosted(options)
        self._handlers: dict[int, Any] = {}

    @property
    def session(self) -> Session:
        """The Session, while the Trainer trains. Raises UsageError at other times."""
        return self._hosted.session

    # ------------------------------------------------------------------ fit begins and ends

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Enter the Session: the strategy has wrapped the module and made the optimizers; the loops have not begun."""
        if current() is not None:
            self._handlers = {number: signal.getsignal(number) for number in _SIGNALS}
            environment = trainer._accelerator_connector.cluster_environment  # whose word Lightning takes
            if isinstance(environment, SLURMEnvironment):
                environment.auto_requeue = False
        progress = _Progress(trainer)
        several = len(trainer.optimizers) > 1
        names = [f"optimizer_{index}" if several else "optimizer" for index in range(len(trainer.optimizers))]
        session = self._hosted.enter(
            {"lightning_epoch": {"rng": None}},
            model=trainer.model, **dict(zip(names, trainer.optimizers, strict=True)), lightning=progress,
        )  # fmt: skip
        self._progress = progress
        self._epoch = session.state["lightning_epoch"]
        self._resumed = session.resumed
        self._next_rng: dict[str, Any] | None = None
        self._counted = int(trainer.global_step)  # optimizer steps that the Session knows of
        if session.resumed and self._epoch["rng"] is not None:
            rng.restore(self._epoch["rng"])
        elif not session.resumed:
            self._epoch["rng"] = rng.capture()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the handlers back that Lightning has replaced; pass over the batches that were trained on."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._resumed:
            self._progress.pass_over()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The training is complete, or was stopped by a callback: save its end."""
        self._progress.is_over = True
        self._epoch["rng"] = rng.capture()  # with which a longer run would begin its next epoch
        self._end_of_batch(trainer)
        self._hosted.leave()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Nothing was left to train."""
        if self._hosted.is_open:
            self._hosted.leave()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """It was broken off."""
        self._hosted.abandon(exception)

    # ------------------------------------------------------------------ epochs and batches

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Note the random state that the order of the epoch's data may follow from; that of the first epoch is known."""
        if trainer.current_epoch > 0 and not self._resumed:
            self._next_rng = rng.capture()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A step ends when the next one begins; several batches may make one."""
        if self._resumed:
            self._progress.settle()
            self._resumed = False
        if self._next_rng is not None:
            self._epoch["rng"], self._next_rng = self._next_rng, None
        self._end_of_batch(trainer)
        self._hosted.begin(_total(trainer))

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Metrics for the status, and for ``keep_best``."""
        values = dict(trainer.callback_metrics)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, torch.Tensor) and loss.numel() == 1:
            values.setdefault("loss", loss)
        if values:
            self.session.log(**values)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """An evaluation has other hang limits."""
        if self._hosted.is_open:
            self._hosted.evaluate(on=True)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Back to training."""
        if self._hosted.is_open:
            self._hosted.evaluate(on=False)

    def _end_of_batch(self, trainer: Any) -> None:
        if trainer.global_step != self._counted:
            self._counted = int(trainer.global_step)
            self._hosted.done()
            self._hosted.end_of_step()


def _total(trainer: Any) -> int | None:
    """Optimizer steps in all, where they can be known."""
    total = trainer.estimated_stepping_batches
    if len(trainer.optimizers) > 1 or total < 0 or not math.isfinite(total):
        return None
    return int(total)


class _Progress:
    """Where Lightning's loops are, and the states of what belongs to the Trainer, as a Stateful."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._loaded: dict[str, Any] = {}
        self.is_over = False

    def state_dict(self) -> dict[str, Any]:
        """Plain values, and what the callbacks and the data module give."""
        trainer = self._trainer
        loops = {
            name: value
            for name, value in trainer.fit_loop.state_dict().items()
            if name != "state_dict"  # positions of loaders, which are ahead by what was fetched
        }
        if self.is_over:  # a longer run begins with the next epoch
            batches = loops["epoch_loop.batch_progress"]
            nothing = dict.fromkeys(batches["current"], 0)
            loops["epoch_loop.batch_progress"] = {**batches, "current": nothing, "is_last_batch": False}
        module: dict[str, Any] = {
            "state_dict": {},
            "epoch": trainer.current_epoch,
            "global_step": trainer.global_step,
        }
        known = set(module)
        trainer.lightning_module.on_save_checkpoint(module)
        return {
            "loops": loops,
            "callbacks": {one.state_key: state for one in trainer.callbacks if (state := one.state_dict())},
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "precision": trainer.precision_plugin.state_dict(),
            "datamodule": trainer.datamodule.state_dict() if trainer.datamodule is not None else {},
            "module": {name: value for name, value in module.items() if name not in known},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back; the loops go on from there when they begin."""
        trainer = self._trainer
        self._loaded = state
        trainer.fit_loop.load_state_dict(state["loops"])
        for one in trainer.callbacks:
            if one.state_key in state["callbacks"]:
                one.load_state_dict(state["callbacks"][one.state_key])
        for config, saved in zip(trainer.lr_scheduler_configs, state["schedulers"], strict=True):
            config.scheduler.load_state_dict(saved)
        trainer.precision_plugin.load_state_dict(state["precision"])
        if trainer.datamodule is not None:
            trainer.datamodule.load_state_dict(state["datamodule"])
        if state["module"]:
            trainer.lightning_module.on_load_checkpoint({"state_dict": {}, **state["module"]})

    @property
    def _batches(self) -> Any:
        return self._loaded["loops"]["epoch_loop.batch_progress"]

    def pass_over(self) -> None:
        """Take the batches of the epoch that were trained on from the loader.

        Its sampler may draw its seed only with the first batch; what comes between here and there is to leave no trace.
        """
        loop = self._trainer.fit_loop
        fetcher = loop._data_fetcher
        for loader in fetcher.combined_loader.flattened:
            for owner in (loader, getattr(loader, "batch_sampler", None)):
                sampler: Any = getattr(owner, "sampler", None)
                if hasattr(sampler, "set_epoch"):  # Lightning does it, too late for us
                    sampler.set_epoch(loop.epoch_progress.current.processed)
        for _ in range(self._batches["current"]["completed"]):
            next(fetcher if fetcher.length is None else fetcher.iterator)
        fetcher.iterator = _resumed(fetcher.iterator, rng.capture())

    def settle(self) -> None:
        """The first batch begins: the counters are those of that moment in the run that was saved.

        Lightning corrects them for checkpoints made at other moments.
        """
        loop = self._trainer.fit_loop.epoch_loop
        loop.batch_progress.load_state_dict(self._batches)
        loop._batches_that_stepped = self._loaded["loops"]["epoch_loop.state_dict"]["_batches_that_stepped"]


def _resumed(iterator: Iterator[Any], state: dict[str, Any]) -> Iterator[Any]:
    """The iterator, with the random state that it would have found."""
    rng.restore(state)
    while (batch := next(iterator, None)) is not None:  # `yield from` would begin it anew
        yield batch
