"""Steps of a script that has no Session: counted by torch's global optimizer-step hooks, onto the control page.

torch is not imported for this: a finder waits for the script's own import of ``torch.optim.optimizer`` and registers the
hooks once that module has loaded. Steps are those of the first optimizer that makes one (of the next one, should that be
collected). A step is counted when its outermost call returns, because a subclass that calls ``super().step()`` can
fire the hooks twice. Once a Session is open the page is the Session's.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import FrameType, ModuleType
from typing import Any

from supervisor.edge.control import ControlPage, Phase, SessionFlag, Word

MODULE = "torch.optim.optimizer"


class StepCounter:
    """The two hooks, for one page."""

    def __init__(self, page: ControlPage, on_first: Callable[[], None]) -> None:
        self._page = page
        self._on_first: Callable[[], None] | None = on_first
        self._first: weakref.ref[object] | None = None
        self._depth = 0
        self._stopped = False

    def stop(self) -> None:
        """Count no more: in a forked child, which shares the page but is not the worker."""
        self._stopped = True

    def before(self, optimizer: object, _args: object, _kwargs: object) -> None:
        """Called by torch before the body of ``optimizer.step``."""
        if self._depth and not _is_inside_step(optimizer):
            self._depth = 0  # an earlier step has raised, and the script went on
        if self._is_ours(optimizer):
            self._depth += 1

    def after(self, optimizer: object, _args: object, _kwargs: object) -> None:
        """Called by torch after it."""
        if not self._is_ours(optimizer):
            return
        self._depth -= 1
        if self._depth > 0:
            return
        self._depth = 0
        page = self._page
        on_first, self._on_first = self._on_first, None
        if on_first is not None and not self._stopped:
            on_first()
        if self._stopped or page[Word.SESSION] & SessionFlag.OPEN:
            return
        now = time.monotonic_ns()
        page[Word.STEP] += 1
        page[Word.HEARTBEAT_NS] = now
        page[Word.PHASE] = Phase.STEP
        if not page[Word.FIRST_STEP_NS]:
            page[Word.FIRST_STEP_NS] = now

    def _is_ours(self, optimizer: object) -> bool:
        first = self._first() if self._first is not None else None
        if first is None:
            self._first, self._depth = weakref.ref(optimizer), 0
            return True
        return first is optimizer


def _is_inside_step(optimizer: object) -> bool:
    """Whether torch's step wrapper for ``optimizer`` is on the stack more than once."""
    frame: FrameType | None = sys._getframe(2)
    code = frame.f_code if frame is not None else None
    count = 0
    while frame is not None:
        if frame.f_code is code and frame.f_locals.get("self") is optimizer:
            count += 1
        frame = frame.f_back
    return count > 1


def _hide_from_compiler() -> None:
    """Have ``torch.compile`` call the hooks rather than trace them: it would recompile as their values change.

    This is what ``torch._dynamo.disable`` does, without its import, which takes seconds. Where torch has no such thing any
    more, compiling is slower and nothing else.
    """
    functions: list[Any] = [StepCounter.before, StepCounter.after, StepCounter._is_ours, _is_inside_step]
    for function in functions:
        function._torchdynamo_disable = True
    with contextlib.suppress(ImportError, AttributeError, TypeError):
        frames: Any = importlib.import_module("torch._C._dynamo.eval_frame")
        skip = frames._FrameExecStrategy(
            frames._FrameAction.SKIP, frames._FrameAction.SKIP
        )  # and what they call
        for function in functions:
            frames.set_code_exec_strategy(function.__code__, skip)


def install(
    page: ControlPage, on_first: Callable[[], None], on_load: Callable[[], None] = lambda: None
) -> None:
    """Count the steps of this process onto ``page`` from its first import of torch on; call ``on_first`` at the first.

    ``on_load`` is called when torch has been imported.
    """

    worker = os.getpid()

    def register(module: ModuleType) -> None:
        if os.getpid() != worker:
            return  # a forked child imports torch: it has the page, and is not the worker
        counter = StepCounter(page, on_first)
        _hide_from_compiler()
        hooks: Any = module
        hooks.register_optimizer_step_pre_hook(counter.before)
        hooks.register_optimizer_step_post_hook(counter.after)
        os.register_at_fork(after_in_child=counter.stop)
        on_load()

    sys.meta_path.insert(0, AfterLoad(MODULE, register))


class AfterLoad:
    """Calls ``then`` with the module ``name`` right after its first load, and leaves no trace of itself."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.then = then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders find, set to call ``then``."""
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        for finder in sys.meta_path:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                self._wrap(spec)
                return spec
        return None

    def _wrap(self, spec: ModuleSpec) -> None:
        loader: Any = spec.loader
        load = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            load(module)
            self.then(module)

        loader.exec_module = exec_module
