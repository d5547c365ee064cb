"""A user's script that writes down all it can see of how it was started, to ``$PROBE/rank-<rank>.json``."""

import atexit
import dataclasses
import inspect
import json
import multiprocessing
import os
import pickle
import signal
import sys
import threading

DIFFERENT = {  # told in the documentation, or different from run to run
    "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_SIGNALS_TO_HANDLE", "PROBE", "_",
}  # fmt: skip
seen: dict[str, object] = {"globals": sorted(globals()), "annotations": "__annotations__" in globals()}


@dataclasses.dataclass
class Point:
    x: int


def in_child(point, queue):
    main = sys.modules["__main__"]
    queue.put(
        [point.x, type(point).__module__, getattr(main, "__file__", None), main.__name__, sys.argv, sys.path]
    )


def forked(queue):
    queue.put([str(signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)])


def at_end():
    seen["at exit"] = [
        Point(3).x,
        pickle.loads(pickle.dumps(Point(4))).x,
        sorted(sys.modules["__main__"].__dict__),
    ]
    with open(os.path.join(os.environ["PROBE"], f"rank-{os.environ.get('RANK', 0)}.json"), "w") as file:
        json.dump(seen, file, indent=1, default=repr)


def late():
    finish.wait()
    seen["thread after the end"] = [Point(5).x, in_child.__module__]


finish = threading.Event()
if __name__ == "__main__":
    main = sys.modules["__main__"]
    seen["main is this"] = main.__dict__ is globals()
    seen |= {
        name: repr(globals()[name])
        for name in ("__name__", "__file__", "__package__", "__cached__", "__doc__")
    }
    seen["spec"] = [getattr(__spec__, name, None) for name in ("name", "origin", "parent", "cached")]
    seen["loader"] = [
        type(__loader__).__name__,
        getattr(__loader__, "name", 0),
        getattr(__loader__, "path", 0),
    ]
    seen["builtins"] = repr(__builtins__)
    seen |= {"argv": sys.argv, "orig_argv": sys.orig_argv, "path": sys.path, "cwd": os.getcwd()}
    seen["flags"] = repr(sys.flags)
    seen["environ"] = {
        k: v for k, v in os.environ.items() if k not in DIFFERENT and not k.startswith("EVERSTEP_")
    }
    seen["code"] = [in_child.__code__.co_filename, inspect.getsource(in_child)]
    seen["pickle"] = pickle.dumps(Point(1)).hex()
    seen["ours"] = [name for name in sys.modules if name.partition(".")[0] in ("supervisor", "launch")]
    seen["threads"] = [thread.name for thread in threading.enumerate()]
    seen["signals"] = [
        str(signal.getsignal(number)) for number in (signal.SIGPIPE, signal.SIGCHLD, signal.SIGQUIT)
    ]
    # multiprocessing does not import a __main__.py again in spawned children, so there is nothing to unpickle to
    spawnable = not (__spec__ and __spec__.name.endswith("__main__"))
    for method in ("spawn", "fork") if spawnable else ("fork",):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        child = context.Process(target=in_child, args=(Point(2), queue))
        child.start()
        seen[method] = queue.get()
        child.join()
        seen[method + " code"] = child.exitcode
    child = context.Process(target=forked, args=(queue,))
    child.start()
    seen["handlers in a forked child"] = queue.get()
    child.join()
    atexit.register(at_end)
    thread = threading.Thread(target=late)
    thread.start()
    threading.Timer(0.05, finish.set).start()
