"""Work in a thread that nobody joins: what a hung file system or server holds up must not hold up the process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Final, TypeVar

T = TypeVar("T")

NAME: Final = "everstep-work"


async def in_thread(work: Callable[[], T]) -> T:
    """Do ``work`` in a daemon thread. Cancelled, it is not waited for, and its result is dropped."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def deliver(result: T | None, error: BaseException | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as caught:  # noqa: BLE001 (it is raised in the loop)
            error = caught
        try:
            loop.call_soon_threadsafe(deliver, result, error)
        except RuntimeError:
            return  # the loop has been closed: nobody waits any more

    threading.Thread(target=run, daemon=True, name=NAME).start()
    return await done


def are_busy() -> bool:
    """Whether any such thread is still at work."""
    return any(thread.name == NAME for thread in threading.enumerate())
