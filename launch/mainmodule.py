"""Run the user's program in the real ``__main__``, exactly as ``python script.py`` or ``python -m module`` would.

Why the real one: classes that the script defines are pickled as ``__main__.Name``, and threads and exit handlers use the
script's globals after its last line. ``runpy.run_path`` swaps in a temporary module and takes it away again, which
breaks all of that. So the script's code is executed in the dict of ``sys.modules["__main__"]``, emptied of us first;
for ``-m`` (and directories and zip files) by the very function of ``runpy`` that the interpreter calls.

An exception goes on to the interpreter, which prints it and chooses the exit code as ever; only our own frames are cut
off the traceback first, in a hook around whatever ``sys.excepthook`` the script has installed.
"""

from __future__ import annotations

import io
import os
import runpy
import sys
import traceback
import zipimport
from collections.abc import Callable
from importlib.machinery import BuiltinImporter, SourceFileLoader, SourcelessFileLoader
from types import CodeType, TracebackType
from typing import Any

from launch.leaving import Leaving
from supervisor.edge.control import Word
from supervisor.edge.link import Link

_LONGEST = 256 << 10  # characters of a traceback or a message that are reported


def run(link: Link, form: str, words: list[str], before: Callable[[], None], leaving: Leaving) -> None:
    """Run ``words`` (target, arguments) as ``form`` says; returns or raises as the program does.

    ``before`` is called when all is as the program will see it, and nothing of the program has been read yet. A fork of the
    worker that comes to the end of the script says nothing: the link is not its own.
    """
    try:
        _run(form, words, before)
    except SystemExit as error:
        if leaving.is_ours:
            if isinstance(error.code, str):  # sys.exit("why") is an error message
                _tell_raised(link, error)
            leaving.says(_code_of(error))
        raise
    except BaseException as error:
        if leaving.is_ours:
            _tell_raised(link, error)
            leaving.says(130 if isinstance(error, KeyboardInterrupt) else 1)
        _cut_our_frames()
        raise
    if leaving.is_ours:
        leaving.says(0)


def _run(form: str, words: list[str], before: Callable[[], None]) -> None:
    words = list(words)
    own = sys.argv[0]
    path = words.pop(0) if form == "run-path" else None
    target, *arguments = words
    sys.argv[:] = [target, *arguments]
    as_module = ["-m"] if form == "module" else []
    sys.orig_argv[:] = [*sys.orig_argv[: sys.orig_argv.index(own)], *as_module, target, *arguments]
    namespace = _fresh_namespace()
    if form == "module":
        sys.argv[0] = "-m"  # what a module sees while its parent packages are imported
        _set_path(os.getcwd())
        before()
        runpy._run_module_as_main(target)  # type: ignore[attr-defined]
    elif _is_container(target):
        sys.path.insert(0, os.path.abspath(target))
        before()
        runpy._run_module_as_main("__main__", False)  # type: ignore[attr-defined]
    else:
        _set_path(path or os.path.dirname(os.path.realpath(target)))
        before()
        exec(_code(target, namespace), namespace)
        for name in ("__file__", "__cached__"):  # the interpreter does so too
            namespace.pop(name, None)


def _fresh_namespace() -> dict[str, Any]:
    """The dict of ``__main__`` as the interpreter makes it, with nothing of ours left."""
    namespace = sys.modules["__main__"].__dict__
    annotated = "__annotations__" in namespace
    builtins = namespace["__builtins__"]
    namespace.clear()
    namespace.update(
        __name__="__main__", __doc__=None, __package__=None, __loader__=BuiltinImporter, __spec__=None
    )
    if annotated:
        namespace["__annotations__"] = {}
    namespace["__builtins__"] = builtins
    return namespace


def _set_path(first: str) -> None:
    if not sys.flags.safe_path:
        sys.path.insert(0, first)


def _is_container(target: str) -> bool:
    """Whether ``target`` is a directory or zip file with a ``__main__`` in it."""
    if os.path.isdir(target):
        return True
    try:
        zipimport.zipimporter(target)
    except zipimport.ZipImportError:
        return False
    return True


def _code(target: str, namespace: dict[str, Any]) -> CodeType:
    # joined, not normalised: so the interpreter does it, and it shows in tracebacks
    file = target if os.path.isabs(target) else os.path.join(os.getcwd(), target)
    namespace.update(__file__=file, __cached__=None)
    if sys.version_info >= (3, 15):
        del namespace["__cached__"]
    if target.endswith(".pyc"):
        sourceless = SourcelessFileLoader("__main__", file)
        namespace["__loader__"] = sourceless
        code = sourceless.get_code("__main__")
        assert code is not None
        return code
    namespace["__loader__"] = SourceFileLoader("__main__", file)
    with io.open_code(file) as source:
        return compile(source.read(), file, "exec", dont_inherit=True)


# --------------------------------------------------------------------------- the end


def _code_of(error: SystemExit) -> int:
    code = error.code
    return code & 0xFF if isinstance(code, int) else 0 if code is None else 1


def _tell_raised(link: Link, error: BaseException) -> None:
    """Say what is ending this worker, before the exit handlers get to run (or to hang)."""
    text = "".join(traceback.format_exception(type(error), error, _without_us(error.__traceback__)))
    try:
        message = str(error)
    except Exception as second:  # noqa: BLE001 (a script's __str__ may do anything)
        message = f"<its text cannot be had: {type(second).__name__}>"
    link.tell(
        "raised",
        type=_name(type(error)),
        message=message[:_LONGEST],
        traceback=text[-_LONGEST:],
        bases=[_name(base) for base in type(error).__mro__ if base is not object],
        step=link.page[Word.STEP] or None,
    )


def _name(kind: type[BaseException] | type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _without_us(trace: TracebackType | None) -> TracebackType | None:
    """The traceback from the frame after the last one of this module, which is what has called the script."""
    rest = trace
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == __file__:
            rest = trace.tb_next
        trace = trace.tb_next
    return rest


def _cut_our_frames() -> None:
    """Have the interpreter show the traceback from the script's first frame on."""
    hook = sys.excepthook

    def cut(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        trace = _without_us(trace)
        sys.excepthook = hook
        sys.last_traceback = trace
        hook(kind, value.with_traceback(trace), trace)

    sys.excepthook = cut
