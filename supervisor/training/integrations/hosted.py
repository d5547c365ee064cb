"""A Session inside a loop that is another library's: entered, moved on and left from its callbacks.

A step ends when the *next* one begins, not when the library says that a batch is over: in between it logs, evaluates and moves
schedules, which belong to the step. What the callbacks of other libraries have in common is here: one that raises leaves the
Session, since the library will not; and a fit that was broken off is closed by the next one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, TypedDict

from supervisor.errors import ConfigError, UsageError
from supervisor.training.session import Session


class Options(TypedDict, total=False):
    """What a callback hands on to its Session."""

    dir: str | os.PathLike[str] | None
    checkpoint_every: str
    keep_last: int
    keep_every: int | None
    keep_best: str | None


def missing(package: str, extra: str, error: ImportError) -> ConfigError:
    """The error for a library that is not installed, or does not import."""
    return ConfigError(
        f"this needs the package {package}: pip install 'everstep[{extra}]' ({type(error).__name__}: {error})"
    )


_open: set[Hosted] = set()


class Hosted:
    """Holds at most one open Session. ``options`` are those of Session; others raise UsageError."""

    def __init__(self, options: Options) -> None:
        unknown = sorted(options.keys() - Options.__annotations__.keys())
        if unknown:
            allowed = ", ".join(Options.__annotations__)
            raise UsageError(f"{unknown[0]!r} is no option of this callback: those of Session are {allowed}")
        Session(**options)  # what is wrong with them is said here, not after an hour of set-up
        self._options = options
        self._session: Session | None = None
        self._evaluating = contextlib.ExitStack()
        self._begun = False  # whether the Session's loop is in a step
        self._done = False  # whether that step's work is done

    @property
    def session(self) -> Session:
        """The one that is open. Raises UsageError where none is."""
        if self._session is None:
            raise UsageError("there is a Session only while the trainer trains")
        return self._session

    @property
    def is_open(self) -> bool:
        """Whether there is one."""
        return self._session is not None

    @property
    def is_pending(self) -> bool:
        """Whether a step's work is done, and the step not ended."""
        return self._done

    def enter(self, values: dict[str, Any], **objects: Any) -> Session:
        """Open one over ``objects``, with ``values`` in its state until something is loaded. Collective over all ranks."""
        for other in list(_open):  # a fit that was broken off, in this process, and still holds the directory
            if other is self or (
                self._options.get("dir") and other._options.get("dir") == self._options["dir"]
            ):
                other.abandon()
        session = Session(**self._options, **objects)
        session.state.update(values)
        session.__enter__()
        self._session = session
        _open.add(self)
        if session.leaves_out:
            error = UsageError("the data of a trainer cannot be left out: run it without --guard-skip")
            self.abandon(error)
            raise error
        self._begun = self._done = False
        return session

    def begin(self, total: int | None) -> None:
        """A step begins: the first one, or the one after that which is done. Raises Stopped."""
        with self._leaving_on_error():
            self.end_of_step()
            if not self._begun:  # also where there are more steps than were announced
                unfinished = total is None or self.session.step < total
                self._begun = self.session.begin(total if unfinished else None)

    def done(self) -> None:
        """What the step computes has been computed; it ends when the next one begins."""
        self._done = True

    def end_of_step(self) -> None:
        """End the step that is done, if one is. Raises Stopped."""
        if self._done:
            self._done = False
            with self._leaving_on_error():
                self._begun = self.session.advance()

    def leave(self) -> None:
        """The training has ended: this was its last step."""
        self.evaluate(on=False)
        self.end_of_step()
        with self._leaving_on_error():
            self.session.finish()
        session, self._session = self.session, None
        _open.discard(self)
        session.__exit__(None, None, None)

    def abandon(self, error: BaseException | None = None) -> None:
        """The training was broken off, by ``error`` or by something that nobody saw."""
        self._evaluating.close()
        _open.discard(self)
        if self._session is None:
            return
        session, self._session = self._session, None
        error = error or UsageError("the training was broken off")
        session.__exit__(type(error), error, error.__traceback__)

    def evaluate(self, *, on: bool) -> None:
        """Whether an evaluation is going on: then other hang limits hold."""
        self._evaluating.close()
        if on and self._session is not None:
            self._evaluating.enter_context(self._session.phase("evaluate"))

    @contextlib.contextmanager
    def _leaving_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.abandon(error)
            raise
