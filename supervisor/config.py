"""The options of ``everstep run``: what each means, which values are allowed, and where they come from.

Flags win over the file (``--config``, else ``everstep.yaml`` in the current directory if there), the file wins over the
defaults. The file knows every option by its flag's name, with dashes or underscores. Whatever is wrong is a ConfigError
of one line that names the file and the key.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from supervisor import guard_options, node_options, telling_options, yaml_file
from supervisor.amounts import parse_rate, parse_size
from supervisor.checkpoint import location
from supervisor.checkpoint.location import TIMEOUT, Location
from supervisor.decide.guard import GuardPolicy
from supervisor.decide.membership import Size
from supervisor.decide.retention import KeepBest, RetentionPolicy
from supervisor.decide.telling import Hook, hooks
from supervisor.edge.store.address import StoreAddress
from supervisor.errors import ConfigError
from supervisor.intervals import INTERVALS, Interval, Unit, parse_duration

DEFAULT_FILE: Final = "everstep.yaml"
SNAPSHOT_EVERY: Final = Interval(unit=Unit.SECONDS, value=30)
CHECKPOINT_EVERY: Final = Interval(unit=Unit.AUTO)


@dataclass(frozen=True, kw_only=True)
class Options:
    """All options of one ``everstep run``. Contradictions raise ConfigError."""

    dir: Path | None = None
    """The job directory. None: ``everstep-runs/<name>``, under SLURM ``<name>-<job id>``; filled in by the command line."""
    name: str | None = None
    """The job's name. None: the script's."""
    checkpoints: Location | None = None
    """Where checkpoints go: a directory, or a URL (s3, gs, az). None: ``checkpoints`` in the job directory."""
    checkpoint_bandwidth: float | None = None
    """Bytes a second that writing checkpoints may take. None: no limit."""
    storage_timeout: float = TIMEOUT
    """Seconds that an object store may take to answer a request."""
    snapshot_every: Interval = SNAPSHOT_EVERY
    """How often the state is copied to host RAM."""
    checkpoint_every: Interval = CHECKPOINT_EVERY
    """How often a snapshot is made durable. ``auto`` weighs the measured cost against the measured failure rate."""
    keep_last: int = 3
    """Keep this many of the newest checkpoints, at least 1."""
    keep_every: int | None = None
    """Also keep those at a multiple of this many steps."""
    keep_best: KeepBest | None = None
    """Also keep the best by a metric that the Session logs: ``METRIC:min|max:M``."""
    max_failures: int = 5
    """Give up after this many failures without progress (newly committed steps) in between; 0: at the first."""
    max_preemptions: int = 100
    """Give up after this many preemptions without progress (newly committed steps) in between; 0: at the first."""
    grace: float = 60.0
    """Seconds that a stop may take to save the state, before everything is killed."""
    hang: float | str = "auto"
    """When ranks that do not go on are taken to hang: ``auto`` (limits learned from the job's own steps), ``off``, or seconds
    that a step may take."""
    hang_startup: float | None = None
    """Seconds up to an attempt's first step without a sign of life. None: 30 minutes, for a job that is known to make steps."""
    hang_floor: float | None = None
    """No learned limit is shorter, in seconds. None: a minute with a Session, ten without, where a false alarm costs more."""
    hang_ceiling: float = 1800.0
    """No learned limit is longer, in seconds; also the limit where nothing can be learned: evaluation, the first save."""
    hang_silence: float | None = None
    """Seconds without any output, for programs whose steps cannot be seen. None: output does not matter."""
    guard: str = "off"
    """Roll back when the logged loss is not finite (``nan``), or also when it jumps (``spike``); else ``off``."""
    guard_loss: str = "loss"
    """The name under which the loss is logged."""
    guard_norm: str = "grad_norm"
    """The name under which the norm of the gradients is logged."""
    guard_factor: float = 10.0
    """A loss is a spike when it lies so many mean absolute deviations above its mean …"""
    guard_patience: int = 3
    """… for so many logged steps in a row."""
    guard_skip: int = 0
    """Steps to leave out after a rollback, with their data, up to the one that showed the trouble. 0: none."""
    guard_times: int = 3
    """Rollbacks that do not get past the trouble; then give up, or accept the new level of a loss that jumped."""
    guard_back: int = 1
    """How many checkpoints further back each repetition goes."""
    standby: str = "on"
    """Keep the next attempt launched and imported beside the current one: ``on`` or ``off``. ``init``: also run the script ahead, up to
    ``init_process_group``."""
    standby_memory: int | None = None
    """Bytes of memory that are to stay free: when less is available the standby is dropped. None: 5 % of all."""
    nnodes: Size | None = None
    """How many nodes: as many as given, or between two numbers. None: what torchrun or the scheduler says, else one."""
    node_rank: int | None = None
    """This node's rank among them, if it matters. None: what torchrun or the scheduler says, else as they come."""
    node_name: str | None = None
    """What this node is called. None: what SLURM calls it, else its hostname."""
    store: StoreAddress | None = None
    """Where the nodes of a job meet: ``tcp://host:port`` (served by the node of that name) or ``etcd://host:port``."""
    lease: float = 5.0
    """Seconds without a word from a node until it is taken for lost."""
    node_timeout: float = 600.0
    """Seconds that a job waits for nodes when there are too few, before it leaves with exit code 75."""
    peer_copies: str = "on"
    """Keep each node's snapshots in another node's memory, too: ``on`` or ``off``."""
    peer_bandwidth: float | None = None
    """Bytes a second that a node may fetch of other nodes' snapshots. None: no limit."""
    notices: str = "auto"
    """Whose notices are watched: ``auto`` (this machine's cloud's), or no cloud's. Signals and deadlines are heeded in any case."""
    requeue: str = "auto"
    """Under a scheduler, have a job that has saved for a stop run again: ``auto`` (where that is possible) or ``off``."""
    hook: tuple[Hook, ...] = ()
    """Who is told of events: commands and webhooks (``decide/telling.py``)."""
    hook_timeout: float = 10.0
    """Seconds that a hook may take to be told one event."""
    metrics_port: int | None = None
    """Port of a Prometheus endpoint; 0: any that is free. None: there is none."""
    metrics_address: str = "127.0.0.1"
    """The address that the endpoint listens on."""
    metrics_file: Path | None = None
    """A file of metrics for node_exporter's textfile collector, ending in ``.prom``."""
    otel: bool = False
    """Send the run and its attempts as OpenTelemetry spans, to where ``OTEL_EXPORTER_OTLP_ENDPOINT`` says."""
    quiet: bool = False
    """Print everstep's own messages only, not the workers' output (which is in the logs)."""
    continue_: bool = False
    """Run a finished job on."""
    config: Path | None = None
    """The file that options were read from."""

    def __post_init__(self) -> None:
        # what the retention policy refuses, it refuses in its own words
        _ = self.retention, self.guard_policy
        for name in ("max_failures", "max_preemptions"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{_flag(name)} {getattr(self, name)}: at least 0")
        if not 0 < self.grace < math.inf:
            raise ConfigError(f"--grace {self.grace:g}s: longer than 0")
        if self.hang_floor is not None and self.hang_floor > self.hang_ceiling:
            raise ConfigError(
                f"--hang-floor {self.hang_floor:g}s is longer than --hang-ceiling {self.hang_ceiling:g}s"
            )
        if self.name is not None and (not self.name or self.name in (".", "..") or "/" in self.name):
            raise ConfigError(f"--name {self.name!r}: a plain name without slashes is required")
        if not 0 < self.storage_timeout < math.inf:
            raise ConfigError(f"--storage-timeout {self.storage_timeout:g}s: longer than 0")
        if self.snapshot_every.is_auto:
            raise ConfigError("--snapshot-every auto: only --checkpoint-every can be auto")
        if self.checkpoint_every.is_never:
            for rule in ("keep_every", "keep_best"):
                if getattr(self, rule) is not None:
                    raise ConfigError(f"{_flag(rule)} has nothing to keep with --checkpoint-every never")
        if self.snapshot_every != SNAPSHOT_EVERY and _is_shorter(self.checkpoint_every, self.snapshot_every):
            raise ConfigError(
                f"--checkpoint-every {self.checkpoint_every} contradicts --snapshot-every {self.snapshot_every}: "
                "a checkpoint is a snapshot made durable, so there cannot be more of them"
            )
        if (
            self.dir is not None
            and isinstance(self.checkpoints, Path)
            and self.dir.absolute() == self.checkpoints.absolute()
        ):
            raise ConfigError(
                f"--checkpoints {self.checkpoints} is the job directory itself: give a directory of its own"
            )

    @property
    def save_every(self) -> tuple[int, ...]:
        """Numbers of steps whose multiples are save points: every rank knows them by itself."""
        every = (self.snapshot_every.steps, self.checkpoint_every.steps)
        return tuple(steps for steps in every if steps is not None)

    @property
    def retention(self) -> RetentionPolicy:
        """Which checkpoints to keep."""
        return RetentionPolicy(keep_last=self.keep_last, keep_every=self.keep_every, keep_best=self.keep_best)

    @property
    def guard_policy(self) -> GuardPolicy:
        """What is watched, and what follows."""
        return GuardPolicy(
            mode=self.guard, loss=self.guard_loss, norm=self.guard_norm, factor=self.guard_factor,
            patience=self.guard_patience, skip=self.guard_skip, times=self.guard_times, back=self.guard_back,
        )  # fmt: skip

    @property
    def checkpoints_directory(self) -> Location:
        """Where checkpoints go, once ``dir`` is known."""
        if self.checkpoints is not None:
            return self.checkpoints
        if self.dir is None:
            raise ConfigError("neither the job directory nor the checkpoints' is known")
        return self.dir / "checkpoints"


def _is_shorter(one: Interval, other: Interval) -> bool:
    """Whether ``one`` comes more often; intervals of different units cannot be compared."""
    return one.unit is other.unit and one.unit in (Unit.STEPS, Unit.SECONDS) and one.value < other.value


def _flag(name: str) -> str:
    return "--" + name.strip("_").replace("_", "-")


# --------------------------------------------------------------------------- from text and YAML to values


def _path(value: object) -> Path:
    text = _text(value)
    if not text:
        raise ConfigError("a path is required, not an empty text")
    return Path(text).expanduser()


def _checkpoints(value: object) -> Location:
    text = _text(value)
    return location.parse(text) if location.is_url(text) else _path(text)


def _text(value: object) -> str:
    if not isinstance(value, str | Path):
        raise ConfigError(f"{_shown(value)} is no text")
    return str(value)


def _whole(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]+", value.strip()):
        return int(value)
    raise ConfigError(f"{_shown(value)} is no whole number")


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{_shown(value)} is neither true nor false")
    return value


def _one_of(*words: str) -> Callable[[object], str]:
    def read(value: object) -> str:
        if isinstance(value, bool):  # YAML reads on and off as these
            value = words[0] if value else "off"
        word = _text(value).strip().lower()
        if word not in words:
            raise ConfigError(f"{word!r}; allowed: {', '.join(words)}")
        return word

    return read


def _snapshot_interval(value: object) -> Interval:
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ConfigError(f"{value} has no unit; allowed: {INTERVALS}")
    return Interval.parse(_text(value))


def _checkpoint_interval(value: object) -> Interval:
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ConfigError(f"{value} has no unit; allowed: auto, {INTERVALS}")
    return Interval.parse(_text(value), auto=True)


def _duration(value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ConfigError(f"{value} has no unit; allowed: 60s, 5m, 1h")
    return parse_duration(_text(value))


def _limit(value: object) -> float:
    seconds = _duration(value)
    if seconds < 1:
        raise ConfigError(f"{seconds:g}s: 1s or longer is required")
    return seconds


def _limit_or_never(value: object) -> float | None:
    return None if isinstance(value, str) and value.strip().lower() == "never" else _limit(value)


def _hang(value: object) -> float | str:
    if isinstance(value, bool):  # YAML reads on and off as these
        return "auto" if value else "off"
    if isinstance(value, str) and value.strip().lower() in ("auto", "off"):
        return value.strip().lower()
    try:
        return _limit(value)
    except ConfigError:
        raise ConfigError(
            f"{value!r}; allowed: auto, off, or a time of 1s or longer, such as 90s or 5m"
        ) from None


def _keep_best(value: object) -> KeepBest:
    return KeepBest.parse(_text(value))


def _shown(value: object) -> str:
    return "nothing" if value is None else f"{value!r} (a {type(value).__name__})"


#: how each option is read, by its field
READERS: Final[Mapping[str, Callable[[object], object]]] = {
    "dir": _path,
    "name": _text,
    "checkpoints": _checkpoints,
    "checkpoint_bandwidth": parse_rate,
    "storage_timeout": _duration,
    "snapshot_every": _snapshot_interval,
    "checkpoint_every": _checkpoint_interval,
    "keep_last": _whole,
    "keep_every": _whole,
    "keep_best": _keep_best,
    "max_failures": _whole,
    "max_preemptions": _whole,
    "grace": _duration,
    "hang": _hang,
    "hang_startup": _limit,
    "hang_floor": _limit,
    "hang_ceiling": _limit,
    "hang_silence": _limit_or_never,
    "guard": guard_options.mode,
    "guard_loss": _text,
    "guard_norm": _text,
    "guard_factor": guard_options.factor,
    "guard_skip": guard_options.steps,
    **dict.fromkeys(("guard_patience", "guard_times", "guard_back"), _whole),
    "standby": _one_of("on", "off", "init"),
    "standby_memory": parse_size,
    **node_options.READERS,
    "peer_copies": _one_of("on", "off"),
    "peer_bandwidth": parse_rate,
    "notices": _one_of("auto", "aws", "gcp", "azure", "slurm", "none"),
    "requeue": _one_of("auto", "off"),
    "hook": hooks,
    "hook_timeout": _limit,
    "metrics_port": telling_options.port,
    "metrics_address": _text,
    "metrics_file": telling_options.metrics_file,
    "otel": _switch,
    "quiet": _switch,
    "continue_": _switch,
}


def load(flags: Mapping[str, object], directory: Path | None = None) -> Options:
    """Options from ``flags`` (field → text, absent where not given) and the configuration file.

    ``directory`` is where ``everstep.yaml`` is looked for (default: the current one). Raises ConfigError.
    """
    given = dict(flags)
    named = given.pop("config", None)
    file = _path(named) if named is not None else (directory or Path()) / DEFAULT_FILE
    values: dict[str, Any] = {}
    if named is not None or file.is_file():
        values = read_file(file)
        values["config"] = file
    for name, value in given.items():
        values[name] = _read(name, value, _flag(name))
    try:
        return Options(**values)
    except ConfigError as error:
        where = f"{file}: " if "config" in values and not given else ""
        raise ConfigError(f"{where}{error}") from None


def read_file(file: Path) -> dict[str, Any]:
    """The options in a YAML file, by field. Raises ConfigError naming the file and the key."""
    values: dict[str, Any] = {}
    for key, value in yaml_file.mapping(file).items():
        name = _field(key, file)
        if name in values:
            raise ConfigError(f"{file}: {_flag(name)[2:]} is given twice")
        values[name] = _read(name, value, f"{file}: {key}")
    return values


def _read(name: str, value: object, where: str) -> object:
    try:
        return READERS[name](value)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _field(key: object, file: Path) -> str:
    """The field of a key. ``continue`` is a keyword of Python, hence its underscore here."""
    name = str(key).replace("-", "_")
    if name == "continue":
        name = "continue_"
    elif name == "continue_" or name not in READERS:
        allowed = sorted(_flag(known)[2:] for known in READERS)
        close = difflib.get_close_matches(str(key).replace("_", "-"), allowed, n=1)
        guess = f" (did you mean {close[0]}?)" if close else ""
        raise ConfigError(f"{file}: unknown key {key!r}{guess}; allowed: {', '.join(allowed)}")
    return name
