"""The lives that ``test_killed.py`` ends at every moment. Runs in a warm process of its own, which forks one for each."""

from __future__ import annotations

import mmap
import os
import shutil
import signal
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from supervisor.resume import Resume
from supervisor.training import Session
from tests.faults import moments, node
from tests.faults.node import STEPS, Supervisor, Training


def sweep(root: Path, who: str) -> dict[str, Any]:
    """Every moment of ``who``'s life; how many there were, how many of them were deaths, and the seconds it took."""
    moments.split_copies()
    started = time.monotonic()
    life: Life = {"node": WholeNode, "worker": Worker, "session": Library}[who](root)
    found = moments.moments(life.fresh("whole"), root / "whole")
    life.check("whole", killed=False)
    deaths = 0
    for number, moment in enumerate(found):
        name = str(number)
        code = moments.killed(life.fresh(name), moment)
        assert code in (0, -signal.SIGKILL), f"at {moment}: {code}"
        deaths += code != 0
        try:
            life.check(name, killed=code != 0)
        except Exception as error:
            raise AssertionError(f"killed at {moment}, kept in {root / name}: {error}") from error
        shutil.rmtree(root / name)
    return {"moments": len(found), "killed": deaths, "seconds": time.monotonic() - started}


class Life(ABC):
    """What is lived through in ``root/<name>``, and what must be true after it was ended anywhere."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.expected = node.reference()
        self._promised = mmap.mmap(-1, mmap.PAGESIZE)  # shared with those who die

    def fresh(self, name: str) -> Callable[[], None]:
        """The life itself, to be called in a fork."""
        (self.root / name).mkdir()
        self._promised[0] = 0
        return lambda: self.live(self.root / name)

    def promise(self, step: int) -> None:
        """``step`` is held whole from now on."""
        self._promised[0] = step

    @property
    def promised(self) -> int:
        """The newest step that was held whole."""
        return self._promised[0]

    @abstractmethod
    def live(self, root: Path) -> None:
        """From the start to the end."""

    @abstractmethod
    def check(self, name: str, *, killed: bool) -> None:
        """After the end."""


class WholeNode(Life):
    """Supervisor and worker die together: the next run finds what they left."""

    def live(self, root: Path) -> None:
        supervisor = Supervisor(root, 0, self.promise)
        node.work(supervisor, supervisor.runtime)
        assert not supervisor.failures, supervisor.failures

    def check(self, name: str, *, killed: bool) -> None:
        node.check(self.root / name, self.expected, self.promised)


class Worker(Life):
    """The worker dies; its supervisor, a process of its own, has the next attempt go on."""

    def fresh(self, name: str) -> Callable[[], None]:
        self._verdict, self._told = os.pipe()
        return super().fresh(name)

    def live(self, root: Path) -> None:
        ours, theirs = Pipe()
        if os.fork() == 0:
            moments.stop_tracing()
            ours.close()
            try:
                self._supervise(root, theirs)
                os.write(self._told, b"fine")
            except BaseException:
                os.write(self._told, traceback.format_exc()[-4000:].encode())
            finally:
                os._exit(0)
        theirs.close()
        node.work(Remote(ours), root / "runtime")

    def _supervise(self, root: Path, worker: Connection) -> None:
        supervisor = Supervisor(root, 0, self.promise)
        try:
            while True:
                method, values, options = worker.recv()
                answer = getattr(supervisor, method)(*values, **options)
                if method in ("resume", "offer"):
                    worker.send(answer)
        except (EOFError, OSError):
            supervisor.snapshots.reset()
        assert not supervisor.failures, supervisor.failures
        supervisor.attempt += 1
        assert supervisor.resume().step >= self.promised
        assert node.work(supervisor, supervisor.runtime).digest() == self.expected[STEPS]
        assert not supervisor.failures, supervisor.failures

    def check(self, name: str, *, killed: bool) -> None:
        os.close(self._told)
        with os.fdopen(self._verdict) as told:
            assert (verdict := told.read()) == "fine", verdict
        node.check(self.root / name, self.expected, self.promised)


class Remote:
    """The desk, from the other side of a pipe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def resume(self) -> Resume:
        self._connection.send(("resume", (), {}))
        return self._connection.recv()  # type: ignore[no-any-return]

    def offer(self) -> int | None:
        self._connection.send(("offer", (), {}))
        return self._connection.recv()  # type: ignore[no-any-return]

    def saved(self, step: int, slot: int) -> None:
        self._connection.send(("saved", (step, slot), {}))

    def failed(self, step: int, slot: int, reason: str, *, torn: bool) -> None:
        self._connection.send(("failed", (step, slot, reason), {"torn": torn}))


class Library(Life):
    """A Session without a supervisor."""

    def live(self, root: Path) -> None:
        self._train(root)

    def _train(self, root: Path) -> str:
        training = Training()
        with Session(
            model=training.model,
            optimizer=training.optimizer,
            dir=root,
            checkpoint_every="2steps",
            keep_last=2,
        ) as session:
            assert session.step >= self.promised, f"{self.promised} was committed: resumed at {session.step}"
            for number in session.steps(STEPS):
                self.promise(number - number % 2)  # saved at every other one
                training.step(number)
                session.state["seen"] = number + 1
            training.values["seen"] = session.state["seen"]
        return training.digest()

    def check(self, name: str, *, killed: bool) -> None:
        root = self.root / name
        for _ in range(2):
            for one, (step, folder) in node.held(root).items():
                assert node.loaded(folder) == (step, self.expected[step]), f"{one} is not of step {step}"
            assert self._train(root) == self.expected[STEPS]
        assert {path.name for path in (root / "checkpoints").iterdir()} == node.held(root).keys()
