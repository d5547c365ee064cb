"""``Session``: the three lines that make a training resumable.

    with Session(model=model, optimizer=optimizer, scheduler=scheduler, loader=loader) as session:
        for step in session.steps(10_000):
            loss = train_step(...)
            session.log(loss=loss)

*It changes no bit of the training.* It draws no random number, steps no optimizer, touches no gradient, and talks to the
other ranks over a group of its own. *A run that was killed and resumed ends bit for bit where an undisturbed one does*,
given the same world size and deterministic kernels; what that takes is said in ``ddp``, ``gradients``, ``items``, ``loaders``,
``optimizers`` and ``rng``. Another world size reshards.

A step ends when the loop asks for the next one. There the Session publishes its progress and looks whether this is a *save
point*: two stores, one load and a comparison when it is none. At a save point the ranks agree in one small collective
whether all of them are clean (no pending gradients, DDP's buckets settled) and where to write; if one is not, the save moves
to the next step. A save that fails is reported and the training goes on.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Generator, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from supervisor.checkpoint.location import is_url
from supervisor.decide.retention import KeepBest, RetentionPolicy
from supervisor.edge.control import Phase, ProposalFlag, ProposalState, SessionFlag, Word
from supervisor.edge.link import STEP, current
from supervisor.errors import ConfigError, UsageError
from supervisor.training.gradients import Gradients
from supervisor.training.keeper import NEVER, Keeper, Stopped, Unkept
from supervisor.training.metrics import Metrics, loss_bits
from supervisor.training.resuming import resume
from supervisor.training.saving import Saver
from supervisor.training.sentinel import Sentinel
from supervisor.training.standalone import Every, Standalone
from supervisor.training.state import TrainingState, check_objects
from supervisor.training.supervised import Supervised, set_phase
from supervisor.training.world import World, say

_PHASES: Final = {"setup": Phase.SETUP, "evaluate": Phase.EVALUATE}


class Session:
    """Keeps the state of the objects given by keyword; enter it once, on every rank, before the training loop.

    An object is a module (plain, compiled, DistributedDataParallel, ``fully_shard``ed, tensor-parallel), an optimizer over
    the modules given, a ``torch.Generator``, or anything with ``state_dict()`` and ``load_state_dict()``; its keyword is its
    name in the checkpoint. Plain picklable values live in ``state``, a dict. Random state is always kept.

    Under ``everstep run`` the supervisor decides when to save. Without one, the keywords that follow make it a library;
    they cannot name objects, and a supervisor overrides them:

    Args:
        dir: Where checkpoints go (``dir/checkpoints``) and where to resume from. None: nothing is saved.
        checkpoint_every: ``50steps``, ``10s``, ``5m``, ``1h`` or ``never`` (then only ``save()`` and the last step).
        keep_last: How many of the newest checkpoints to keep.
        keep_every: Also keep every one at a multiple of that many steps.
        keep_best: ``METRIC:min|max:M``: also keep the M best by a metric that ``log`` was given.
        objects: What to keep.

    Raises:
        UsageError: an object that cannot be kept, one given twice, a parameter that is in no module given.
        ConfigError: an option that is not understood; (entering, without a supervisor) a URL as ``dir``.
        CheckpointError: (entering) nothing could be loaded although a checkpoint is there.
        StorageError: (entering) storage would not give the checkpoint, though it may be good.
        JobError: (entering) another run uses ``dir``.
        StateMismatchError: (entering) the checkpoint has other keys, shapes or dtypes than the training.
    """

    def __init__(
        self,
        *,
        dir: str | os.PathLike[str] | None = None,  # noqa: A002 (the word users know)
        checkpoint_every: str = "10m",
        keep_last: int = 3,
        keep_every: int | None = None,
        keep_best: str | None = None,
        **objects: Any,
    ) -> None:
        check_objects(objects)
        self._objects = objects
        self._given = "" if dir is None else os.fspath(dir)
        self._root = None if dir is None else Path(dir).absolute()
        self._every = Every.parse(checkpoint_every)
        best = None if keep_best is None else KeepBest.parse(keep_best)
        self._policy = RetentionPolicy(keep_last=keep_last, keep_every=keep_every, keep_best=best)
        #: plain picklable values, saved and restored with the rest
        self.state: dict[str, Any] = {}
        self._step = 0
        self._total: int | None = None
        self._resumed = False
        self._entered = self._open = self._looping = self._in_body = self._stopping = False
        self._due = 0
        self._requested = 0  # the last step that save() asked for
        self._by_hand: Generator[int] | None = None
        self._keeper: Keeper = Unkept()
        self._metrics = Metrics(self._publish)

    # ------------------------------------------------------------------ what a script may ask

    @property
    def step(self) -> int:
        """The step that is running, or else the next to run; also the number of steps completed before it."""
        return self._step

    @property
    def resumed(self) -> bool:
        """Whether this run goes on from a saved state."""
        return self._resumed

    @property
    def leaves_out(self) -> bool:
        """Whether steps are to be left out from here on (``--guard-skip``)."""
        return any(skip.stop > self._step for skip in self._keeper.skips)

    @property
    def attempt(self) -> int:
        """Which launch of the job this is, from 0."""
        return self._keeper.attempt

    @property
    def should_stop(self) -> bool:
        """Whether the job will stop at the next save point or has stopped: cut short what can be."""
        words = self._keeper.words
        if self._stopping or not self._open:
            return self._stopping
        committed = (
            words[Word.PROPOSAL] & 3 == ProposalState.COMMITTED and words[Word.PROPOSAL_STEP] > self._step
        )
        return committed and bool(words[Word.PROPOSAL_FLAGS] & ProposalFlag.STOP)

    def log(self, **metrics: Any) -> None:
        """Note the newest values of metrics: numbers, or tensors of one element. Never waits for the device at every step.

        They show in the status, and go with the checkpoints (``keep_best``).
        """
        self._metrics.log(metrics)

    def save(self) -> None:
        """Save at the end of the step that is running, and make the snapshot a checkpoint.

        Call it on all ranks. Under a supervisor one rank is enough: it saves at the end of this step if no rank is past it,
        else a few steps later. A step that is broken out of after ``save()`` counts as complete, and is saved when the
        ``with`` block is left.
        """
        self._check_open("save()")
        self._requested = self._step + 1
        self._keeper.request(self._step + 1)
        self._due = min(self._due, self._keeper.due)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """While in the block the worker does something else than training (``evaluate``, ``setup``): other hang limits."""
        if name not in _PHASES:
            raise UsageError(f"phase({name!r}): one of {', '.join(_PHASES)} is required")
        self._check_open("phase()")
        self._saver.flush()  # an evaluation may swap weights
        before = set_phase(self._keeper.words, _PHASES[name])
        try:
            yield
        finally:
            set_phase(self._keeper.words, before)

    # ------------------------------------------------------------------ entering and leaving

    def __enter__(self) -> Self:
        """Resume, if there is something to resume from. Collective over all ranks."""
        if self._entered:
            raise UsageError("a Session is entered once: make another")
        self._entered = True
        try:
            self._enter()
        except BaseException:
            self._keeper.close()
            raise
        return self

    def _enter(self) -> None:
        started = time.monotonic()
        link = current()
        if link is not None:
            self._keeper = Supervised(link)
            set_phase(self._keeper.words, Phase.RESTORE)
            self._keeper.words[Word.SESSION] |= SessionFlag.OPEN
            self._keeper.tell("session")
        world = World(apart=link is not None)
        if link is None and self._root is not None:
            if is_url(self._given):
                raise ConfigError(
                    f"dir={self._given}: without `everstep run` a Session saves to a directory; "
                    "`everstep run --checkpoints URL` saves to an object store"
                )
            self._keeper = Standalone(self._root, self._every, self._policy, world)
        elif world.rank == 0 and link is None:
            say("there is neither a supervisor nor dir=: nothing is saved")
        elif world.rank == 0 and self._root is not None:
            say("dir= is ignored: the supervisor keeps the checkpoints")
        self._world = world
        self._training = TrainingState(self._objects, self.state, world)
        step = resume(self._keeper, self._training, world)
        if step is not None:
            self._step, self._resumed = step, True
            self._keeper.tell("resumed", step=step, seconds=time.monotonic() - started)
        self._gradients = Gradients(self._training.optimizers, self._training.modules, self._training.others)
        self._saver = Saver(self._keeper, self._training, self._gradients, world, self._metrics)
        keeper = self._keeper
        if keeper.guard is not None:
            sentinel = Sentinel(keeper.guard, keeper.words, keeper.tell, self._training.loaders, keeper.known)
            self._metrics.watch, self._metrics.settle = partial(self._watch, sentinel), sentinel.settle
        self._keeper.words[Word.STEP] = self._step
        os.environ[STEP] = str(self._step)  # for what reads where to go on from its environment
        set_phase(self._keeper.words, Phase.SETUP)
        self._open = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave. An exception goes on its way, and nothing is saved; in order, what is still to be saved is."""
        in_order = kind is None or issubclass(kind, Stopped)
        try:
            self._world.leave(in_order=in_order)
            if kind is None:
                asked = self._requested == self._step + 1
                self._step = self._saver.leave(self._step, broken_out=self._in_body, asked=asked)
            if in_order:
                self._saver.flush()
                self._metrics.flush()
        finally:
            self._open = False
            self._saver.close()
            self._gradients.close()
            self._keeper.close()
        words = self._keeper.words
        set_phase(words, Phase.CLOSED)
        if in_order:
            words[Word.SESSION] |= SessionFlag.CLOSED
        completed = kind is None and self._total is not None and self._step >= self._total
        self._keeper.tell("closed", step=self._step, completed=completed)

    # ------------------------------------------------------------------ the loop

    def steps(self, total: int | None = None) -> Generator[int]:
        """The steps to run: from the one resumed at, up to ``total`` (None: until the loop is left).

        A job that has completed ``total`` steps yields nothing. Fetch a step's data in its
        body: what is fetched before the previous step ends (``zip(loader, session.steps(n))``) is lost on resume.

        A step has ended when the loop asks for the next one: one that is broken out of is not counted, and runs again in a
        later loop, unless ``save()`` was called in it. The last step is saved as soon as no gradients are pending: at the
        latest when the Session is left.

        Raises Stopped after the save when the job was asked to stop, UsageError outside the ``with`` block and for a second
        loop inside a loop.
        """
        self._check_open("steps()")
        if self._looping:
            raise UsageError("a loop over steps() is running already")
        if total is not None and total < 0:
            raise UsageError(f"steps({total}): a number of steps, 0 or more, is required")
        if self._stopping and (total is None or total > self._step):
            raise Stopped
        self._total = total
        self._keeper.words[Word.TOTAL_STEPS] = total or 0
        self._keeper.tell("session", total_steps=total)
        return self._loop(NEVER if total is None else total)

    def begin(self, total: int | None = None) -> bool:
        """The first step begins, in a loop that is not ours to write: as the first turn of ``steps(total)``.

        Call it right before that step's computation: the random state is restored here. Returns whether there is a step to
        run. Then ``advance()`` ends each step. Raises as ``steps`` does.
        """
        self._by_hand = self.steps(total)
        return self.advance()

    def advance(self) -> bool:
        """The step that was running is complete, and the next begins, if there is one: what the answer says.

        Raises Stopped after the save when the job was asked to stop, UsageError where no step was begun.
        """
        if self._by_hand is None:
            raise UsageError("advance() ends a step that begin() has begun: there is none")
        return next(self._by_hand, None) is not None

    def finish(self) -> None:
        """The training has come to its end after the steps completed so far, whatever ``total`` was said to be: save them.

        A step that was begun and is not to count (``advance()`` begins one) is forgotten. On all ranks alike.
        """
        self._check_open("finish()")
        begun, self._by_hand = self._by_hand, None
        if begun is not None:
            begun.close()
        if self._total == self._step and not self._in_body:
            return
        self._in_body = False
        self._total = self._step
        self._keeper.words[Word.TOTAL_STEPS] = self._step
        self._keeper.tell("session", total_steps=self._step)
        if begun is not None and self._saver.saved != self._step:  # else all is as it was loaded
            self._end_of_step(self._step, is_last=True)

    def _loop(self, total: int) -> Generator[int]:
        self._check_open("steps()")
        self._looping, self._in_body = True, False
        keeper, words, now = self._keeper, self._keeper.words, time.monotonic_ns
        stepped, none_stepped = self._gradients.stepped, self._gradients.none_stepped
        at_step, at_heartbeat, at_proposal = int(Word.STEP), int(Word.HEARTBEAT_NS), int(Word.PROPOSAL)
        completed = self._step
        skip_at = next((skip.first for skip in keeper.skips if skip.stop > completed), NEVER)
        if (
            completed < total
        ):  # what precedes an epoch's loop has drawn already, also in the run that is resumed
            self._training.restore_rng()
        self._due = completed + 1  # the first step is looked at in any case
        set_phase(words, Phase.STEP)
        try:
            while completed < total:
                if completed >= skip_at:
                    completed, skip_at = self._leave_out(completed, total)
                    continue
                stepped[:] = none_stepped
                self._in_body = True
                yield completed
                self._in_body = False
                completed += 1
                self._step = completed
                words[at_step] = completed
                words[at_heartbeat] = now()
                if completed >= self._due or words[at_proposal] != keeper.settled or completed == total:
                    self._end_of_step(completed, is_last=completed == total)
        finally:
            self._looping = False

    def _leave_out(self, completed: int, total: int) -> tuple[int, int]:
        """Pass over the steps that are left out from here on, and their data; the step to run, and where to stop next."""
        skip, *later = [one for one in self._keeper.skips if one.stop > completed]
        step = min(skip.stop, total)
        if self._world.rank == 0:
            say(f"steps {completed} to {step - 1} are left out, and their data with them")
        for name, loader in self._training.loaders.items():
            loader.drop((step - completed) * skip.batches.get(name, 1))
        words = self._keeper.words
        self._step = words[Word.STEP] = step
        words[Word.HEARTBEAT_NS] = time.monotonic_ns()
        if step == total:
            self._end_of_step(step, is_last=True)
        following = skip if skip.stop > step else later[0] if later else None
        return step, NEVER if following is None else following.first

    def _end_of_step(self, completed: int, *, is_last: bool) -> None:
        words = self._keeper.words
        if not words[Word.FIRST_STEP_NS]:
            words[Word.FIRST_STEP_NS] = time.monotonic_ns()
            if (link := current()) is not None:
                link.at_first_step()  # there may be no optimizer of torch's that would tell
        stop = self._saver.end_of_step(completed, is_last=is_last)
        self._due = self._saver.due
        if stop:
            self._stopping = True
            if not is_last:  # else the script may have no more to do: the next steps() knows
                raise Stopped

    def _watch(self, sentinel: Sentinel, values: Mapping[str, Any]) -> None:
        if self._in_body and self._keeper.words[Word.PHASE] == Phase.STEP:
            sentinel.look(self._step, values)

    def _check_open(self, what: str) -> None:
        if not self._open:
            raise UsageError(f"{what} is for the inside of `with Session(…) as session:`")

    def _publish(self, values: dict[str, float]) -> None:
        if (loss := values.get("loss")) is not None:
            self._keeper.words[Word.LOSS] = loss_bits(loss)
        if self._open and self._world.rank == 0:
            self._keeper.tell("metrics", step=self._step, values=values)
