"""Work in a thread that nobody joins: what a hung file system or server holds up must not hold up the process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from typing import Final, TypeVar

T = TypeVar("T")

NAME: Final = "everstep-work"
_NONE: Final = object()


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


def each(action: Callable[[T], object], items: Iterable[T], count: int) -> None:
    """``action`` of every item, on ``count`` daemon threads; the first error stops what has not begun, and is raised.

    In a thread itself: it returns when the last one has ended. Where no thread can be had, it does the work.
    """
    waiting = iter(items)
    lock = threading.Lock()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while not errors:
                with lock:
                    item = next(waiting, _NONE)
                if item is _NONE:
                    return
                action(item)  # type: ignore[arg-type]
        except BaseException as error:  # noqa: BLE001 (it is raised where it was asked for)
            errors.append(error)

    threads: list[threading.Thread] = []
    for _ in range(count):
        thread = threading.Thread(target=work, daemon=True, name=NAME)
        try:
            thread.start()
        except RuntimeError:  # there are too many already
            break
        threads.append(thread)
    if not threads:
        work()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def are_busy() -> bool:
    """Whether any such thread is still at work."""
    return any(thread.name == NAME for thread in threading.enumerate())
