"""Accelerate: a Session over what ``accelerator.prepare`` returned, and a loop over its data that resumes.

    from supervisor.training.integrations.accelerate import batches, session_of

    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    with session_of(accelerator, model=model, optimizer=optimizer, scheduler=scheduler) as session:
        for step, batch in batches(session, loader, epochs=3):
            ...

No ``accelerate launch`` is needed: ``everstep run torchrun --nproc-per-node=2 train.py`` sets what Accelerate reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import SequentialSampler

from supervisor.errors import UsageError
from supervisor.training import rng
from supervisor.training.integrations.hosted import missing
from supervisor.training.session import Session

try:
    from accelerate import Accelerator, skip_first_batches
    from accelerate.data_loader import SeedableRandomSampler
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.scheduler import AcceleratedScheduler
except ImportError as error:
    raise missing("accelerate", "accelerate", error) from error


def session_of(accelerator: Accelerator, **given: Any) -> Session:
    """``Session(**given)``, over prepared objects; a gradient scaler is kept, too. Raises as Session does."""
    kept = {name: _seen_through(value) for name, value in given.items()}
    if accelerator.scaler is not None:
        kept["accelerate_scaler"] = accelerator.scaler
    return Session(**kept)


def _seen_through(value: Any) -> Any:
    """What a wrapper of Accelerate's holds: its steps are those of the thing inside."""
    if isinstance(value, AcceleratedOptimizer):
        return value.optimizer
    return value.scheduler if isinstance(value, AcceleratedScheduler) else value


def batches(session: Session, loader: Any, *, epochs: int) -> Iterator[tuple[int, Any]]:
    """Steps and their batches: ``session.steps`` over ``epochs`` passes over a prepared ``loader``, from where it resumed.

    One batch is one step; with gradient accumulation, save points wait for the batch that steps. The position follows from
    the step, so the order of an epoch must follow from its number: no shuffling, or Accelerate's seedable sampler.

    Raises UsageError for a loader of another order, or of unknown length.
    """
    sampler = loader.get_sampler() if hasattr(loader, "get_sampler") else None
    if not isinstance(sampler, (SeedableRandomSampler, SequentialSampler)):
        raise UsageError(
            f"the order of {type(sampler).__name__} does not follow from the epoch: give Accelerator "
            "dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True), or a loader that does not shuffle"
        )
    each = len(loader)
    iterator: Iterator[Any] | None = None
    for step in session.steps(epochs * each):
        epoch, offset = divmod(step, each)
        if iterator is not None and offset:
            yield step, next(iterator)
            continue
        loader.set_epoch(epoch)
        if hasattr(sampler, "set_epoch"):  # a shard does not hand it on
            sampler.set_epoch(epoch)
        if offset == 0:
            iterator = iter(loader)
            yield step, next(iterator)
            continue
        iterator = iter(skip_first_batches(loader, offset))
        with rng.untouched():  # the undisturbed run has its iterator already
            batch = next(iterator)
        yield step, batch
