"""What one node's supervisor does beside its main task: a part that breaks ends all of it, at once and with its reason.

A task that nobody awaits would die in silence, and the job would wait for what it did for ever: orders that are not given any more, reports
that are not read. So it is started here. The first error ends the main task, which leaves in good order, and is what it ends with.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator
from contextvars import ContextVar
from typing import Any, Final, TypeVar

T = TypeVar("T")

_kept: Final[set[asyncio.Task[Any]]] = set()  # the loop itself would forget them


class _Main:
    """The task that is ended, and why."""

    def __init__(self, task: asyncio.Task[Any] | None) -> None:
        self.task = task
        self.error: BaseException | None = None

    def look(self, task: asyncio.Task[Any]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and self.error is None and self.task is not None:
            self.error = error
            self.task.cancel()


_main: ContextVar[_Main | None] = ContextVar("_main", default=None)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """What is started within ends the current task if it breaks: then this raises its error."""
    main = _Main(asyncio.current_task())
    token = _main.set(main)
    try:
        yield
        if main.error is not None:
            raise main.error
    except asyncio.CancelledError:
        if main.error is None:
            raise
        if main.task is not None:
            main.task.uncancel()
        raise main.error from None
    finally:
        main.task = None
        _main.reset(token)


def start(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Have it done beside all else."""
    task = asyncio.get_running_loop().create_task(work)
    _kept.add(task)
    task.add_done_callback(_kept.discard)
    if (main := _main.get()) is not None:
        task.add_done_callback(main.look)
    return task
