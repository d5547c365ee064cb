"""An object store as the drain sees it: whole objects put, got, listed and deleted, each within a known time.

Two layers try again. A request (one part of an upload, one range) that fails or is not answered is repeated by the store's
client, a few times within ``timeout``. An operation whose requests are used up is begun anew (an upload: with a new upload,
hashed anew), by ``attempts`` and ``patience``, all of them counted for the operation alone. Refusals (no permission, no
such bucket) are not tried again. What is left after that is a StorageError.

An upload that is given up is aborted, so that its parts cost nothing. Where even that cannot be done (the server hangs, the
process is killed), they stay with the server, invisible, until ``abandoned`` or a rule of the bucket removes them.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

import obstore
import tenacity
from obstore import exceptions as refusals
from obstore.store import ObjectStore, from_url

from supervisor.checkpoint.location import Remote
from supervisor.checkpoint.manifest import FileEntry, Key
from supervisor.checkpoint.verify import Hasher
from supervisor.edge import clock
from supervisor.edge.files import Pace
from supervisor.errors import CancelledError, ConfigError, StorageError

T = TypeVar("T")

PART: Final = 8 << 20  # bytes of one part of an upload, and of one ranged read
_MOST_PARTS: Final = 9000  # of one upload; S3 allows 10,000
_FINAL: Final = (
    refusals.NotFoundError,
    refusals.PermissionDeniedError,
    refusals.UnauthenticatedError,
    refusals.AlreadyExistsError,
    refusals.PreconditionError,
    refusals.NotSupportedError,
    refusals.InvalidPathError,
    refusals.UnknownConfigurationKeyError,
)
_TAKEN: Final = (refusals.AlreadyExistsError, refusals.PreconditionError)
_STATUS: Final = re.compile(r"status code: ([0-9]{3} [A-Za-z ]+)")
_CODE: Final = re.compile(r"<Code>(\w+)</Code>")
_ABORT: Final = (
    1.0  # seconds that a cancelled upload may take to be aborted, beside what it may take to settle
)
_LOOK: Final = 0.1  # seconds between two looks at whether to stop


class RefusedError(StorageError):
    """The store says no, and will say so again."""


class MissingError(StorageError):
    """There is no such object."""


class TakenError(StorageError):
    """There is such an object already."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long the store is waited for, and how much is asked of it at once."""

    timeout: float  # seconds for one request, with the client's own repetitions
    attempts: int = 4
    patience: float | None = None  # seconds from its first failure on; None: 2 × timeout
    parallel: int = 4  # requests at once
    first_wait: float = 0.2  # seconds, doubling
    settling: float = (
        1.0  # seconds for what is in the air to be answered, once an upload has failed or was cancelled
    )

    @property
    def grace(self) -> float:
        """Seconds that a cancelled operation has to end by itself."""
        return self.settling + _ABORT

    @property
    def until(self) -> float:
        """Seconds from its first failure after which an operation is not begun anew."""
        return 2 * self.timeout if self.patience is None else self.patience


def connect(where: Remote, limits: Limits) -> ObjectStore:
    """A client for ``where``, with endpoint and credentials from the environment. Raises ConfigError; asks nobody."""
    seconds = timedelta(seconds=limits.timeout)
    insecure = any(_is_on(os.environ.get(f"{cloud}_ALLOW_HTTP")) for cloud in ("AWS", "AZURE", "GOOGLE"))
    try:
        return from_url(
            where.url,
            client_options={
                "timeout": seconds,
                "connect_timeout": min(seconds, timedelta(seconds=5)),
                "allow_http": insecure,
            },
            retry_config={
                "max_retries": 3,
                "retry_timeout": seconds,
                "backoff": {
                    "init_backoff": timedelta(seconds=limits.first_wait),
                    "max_backoff": timedelta(seconds=max(limits.first_wait, limits.timeout / 10)),
                    "base": 2,
                },
            },
        )
    except refusals.BaseError as error:
        raise ConfigError(f"{where}: {reason(error)}") from None


class Bucket:
    """The objects below one prefix. Its coroutines run in a loop of their own (``run``)."""

    def __init__(self, store: ObjectStore, where: Remote, limits: Limits) -> None:
        self.where = where
        self.limits = limits
        self._store = store

    # ------------------------------------------------------------------ whole operations

    async def put(self, name: str, data: bytes, *, create: bool = False) -> None:
        """Write a small object; ``create``: raises TakenError where there is one.

        A repeated request may find what the one before it has written, unheard: who creates compares (``objects``).
        """
        mode: Any = "create" if create else "overwrite"
        await self._again(
            f"writing {name}",
            lambda: obstore.put_async(self._store, name, data, mode=mode, use_multipart=False),
        )

    async def upload(self, name: str, file: Path, size: int, key: Key | None, feed: Feed) -> FileEntry:
        """Write ``file``, hashed as it is read; what the manifest says of it."""
        part = max(PART, -(-size // _MOST_PARTS))
        entry: FileEntry | None = None

        async def attempt() -> None:
            nonlocal entry
            hasher = Hasher(key, size)
            parts = feed.parts(file, size, part, hasher)
            if size <= part:
                data = b"".join([chunk async for chunk in parts])
                await obstore.put_async(self._store, name, data, use_multipart=False)
            else:
                await obstore.put_async(
                    self._store, name, parts, use_multipart=True, chunk_size=part,
                    max_concurrency=self.limits.parallel,
                )  # fmt: skip
            entry = hasher.entry(size)

        await self._again(f"writing {name}", attempt)
        assert entry is not None
        return entry

    async def get(self, name: str, largest: int) -> bytes:
        """A small object. Raises MissingError, StorageError when it is larger than ``largest`` bytes."""

        async def attempt() -> bytes:
            found = await obstore.get_async(self._store, name)
            if found.meta["size"] > largest:
                raise StorageError(f"{self.where}/{name} is larger than {largest} bytes")
            return bytes(await found.bytes_async())

        return await self._again(f"reading {name}", attempt)

    async def range(self, name: str, start: int, length: int) -> memoryview:
        """``length`` bytes from ``start`` on; fewer where the object ends."""
        return memoryview(
            await self._again(
                f"reading {name}",
                lambda: obstore.get_range_async(self._store, name, start=start, length=length),
            )
        )

    async def sizes(self, prefix: str | None = None) -> dict[str, int]:
        """Every object below ``prefix`` (a whole part of the name) and its size."""

        async def attempt() -> dict[str, int]:
            found = await obstore.list(self._store, prefix).collect_async()
            return {entry["path"]: entry["size"] for entry in found}

        return await self._again("listing", attempt)

    async def delete(self, names: list[str]) -> None:
        """Remove objects; those that are gone already do not matter."""
        limit = asyncio.Semaphore(self.limits.parallel)

        async def one(name: str) -> None:  # one by one: some stores raise for a list of which one is gone
            async with limit:
                try:
                    await self._again(f"removing {name}", lambda: obstore.delete_async(self._store, name))
                except MissingError:
                    return

        await together(map(one, names))

    # ------------------------------------------------------------------ time

    async def _again(self, doing: str, action: Callable[[], Awaitable[T]]) -> T:
        """Do it, anew after a failure that may pass. Raises StorageError."""
        try:
            async for attempt in tenacity.AsyncRetrying(
                retry=tenacity.retry_if_exception(_may_pass),
                stop=_Patience(self.limits),
                wait=tenacity.wait_exponential(
                    multiplier=self.limits.first_wait,
                    max=max(self.limits.first_wait, self.limits.timeout / 4),
                ),
                reraise=True,
            ):
                with attempt:
                    return await action()
        except (refusals.BaseError, OSError, NotImplementedError) as error:  # some of its errors are built in
            raise _translated(error, f"{doing} in {self.where} failed") from None
        raise AssertionError("tenacity returns or raises")


class _Patience:
    """When to stop: the time counts from the first failure, for an upload may take long before it fails."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._since: float | None = None

    def __call__(self, state: tenacity.RetryCallState) -> bool:
        now = clock.monotonic()
        self._since = now if self._since is None else self._since
        return state.attempt_number >= self._limits.attempts or now - self._since >= self._limits.until


class Feed:
    """The parts of the files of one drain, at the pace allowed, until it is told to stop."""

    def __init__(self, pace: Pace | None, cancelled: Callable[[], bool]) -> None:
        self._pace = pace
        self._cancelled = cancelled
        self._stopped = False

    def stop(self) -> None:
        """Give no more parts."""
        self._stopped = True

    async def parts(self, file: Path, size: int, part: int, hasher: Hasher) -> AsyncIterator[bytes]:
        """The bytes of ``file``, hashed. Raises StorageError when it has not ``size`` bytes, CancelledError."""

        def read(fd: int) -> bytes:
            data = os.read(fd, part)
            while 0 < len(data) < part and (more := os.read(fd, part - len(data))):
                data += more
            hasher.update(memoryview(data))
            return data

        done = 0
        try:
            fd = await asyncio.to_thread(
                os.open, file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            )
        except OSError as error:
            raise StorageError(f"reading {file} failed: {error.strerror}") from None
        try:
            while True:
                if self._stopped or self._cancelled():
                    raise CancelledError(f"the drain of {file} was cancelled")
                if not (data := await asyncio.to_thread(read, fd)):
                    break
                done += len(data)
                if self._pace is not None:
                    await asyncio.sleep(self._pace.spend(len(data)))
                yield data
        finally:
            os.close(fd)
        if done != size:
            raise StorageError(f"{file} changed while it was copied: {done} bytes read, it had {size}")


def run(
    work: Coroutine[Any, Any, T],
    cancelled: Callable[[], bool] = lambda: False,
    *,
    grace: float = Limits.settling + _ABORT,
) -> T:
    """Do ``work`` in this thread. Once ``cancelled`` says so, it has ``grace`` seconds to end by itself (CancelledError)."""

    async def watched() -> T:
        task = asyncio.ensure_future(work)
        while not (await asyncio.wait({task}, timeout=_LOOK))[0]:
            if cancelled():
                await asyncio.wait({task}, timeout=grace)
                break
        if not task.done():
            task.cancel()
            raise CancelledError("cancelled, and the store did not answer")
        return task.result()

    return asyncio.run(watched())


async def together(work: Iterable[Coroutine[Any, Any, T]], *, settling: float = 0.0) -> list[T]:
    """All results, in order; the first error ends the others before it is raised.

    They may take ``settling`` seconds to end by themselves: a server may yet carry out a request that is given up.
    """
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    except StorageError:
        await asyncio.wait(tasks, timeout=settling)
        raise
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# --------------------------------------------------------------------------- errors


def reason(error: Exception) -> str:
    """What went wrong, in a few words: the client's own account is many lines long."""
    text = str(error)
    status, code = _STATUS.search(text), _CODE.search(text)
    if status is not None:
        return status[1].strip() + (f" ({code[1]})" if code else "")
    line = text.partition("\n")[0].strip()[:300]
    return f"no answer in time: {line}" if "TimedOut" in text else line


def _translated(error: Exception, what: str) -> StorageError:
    text = f"{what}: {reason(error)}"
    if isinstance(error, refusals.NotFoundError | FileNotFoundError):
        return MissingError(text)
    if isinstance(error, _TAKEN):
        return TakenError(text)
    return RefusedError(text) if isinstance(error, _FINAL) else StorageError(text)


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, refusals.BaseError | ConnectionError) and not isinstance(error, _FINAL)


def _is_on(value: str | None) -> bool:
    return value is not None and value.strip().lower() in ("1", "true", "yes", "on")
