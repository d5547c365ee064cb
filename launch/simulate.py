"""``everstep simulate``: the goodput of a run before it is paid for, by the decision core on a simulated clock."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from supervisor.errors import ConfigError, JobError, UsageError

if TYPE_CHECKING:
    from supervisor.decide.measured import Measured
    from supervisor.decide.scenario import Blow, Costs, Outcome, Plan, Strike

DAY: Final = 86400.0
SWEEP: Final = ("30s", "1m", "2m", "5m", "10m", "20m", "30m", "1h", "2h")
TEXT = """\
Simulates a training run of days or weeks: seeded failures strike it, and everstep's own decision core answers, saves and
accounts for every second. What things cost comes from options, or (--dir) from the journal of a job that has run.
"""
END = """\
times: 0.5s, 10m, 2h, 54d. The same seed meets every setting with the same failures.
"""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published run: how often it was interrupted."""

    gpus: int
    days: float
    interruptions: int
    node_share: float  # of the interruptions, those that take a node's memory
    source: str

    @property
    def gpu_mtbf(self) -> float:
        """Seconds between two failures of one GPU and what it needs, on average."""
        return self.days * DAY * self.gpus / self.interruptions


PRESETS: Final = {
    "llama3": Preset(
        gpus=16384, days=54, interruptions=419, node_share=0.78,
        source="419 unexpected interruptions in 54 days on 16,384 GPUs, 78 % of them hardware (arXiv:2407.21783, 3.3.4)",
    ),
    "opt-175b": Preset(
        gpus=992, days=60, interruptions=105, node_share=1.0,
        source="35 manual and an estimated 70 automatic restarts over hardware in two months on 992 GPUs (arXiv:2205.01068, 2.5)",
    ),
}  # fmt: skip

#: option, the cost that it gives, what it is
_COSTS: Final = (
    ("step-time", "step", "one step"),
    ("stall", "stall", "what a snapshot stops the training"),
    ("drain", "drain", "from a snapshot to a committed checkpoint"),
    ("startup", "startup", "a cold launch up to the first step"),
    ("relaunch", "relaunch", "the same by the standby"),
    ("standby", "standby", "from the first step until the next attempt waits as a standby"),
    ("detection", "detection", "to notice a death"),
    ("hang-detection", "hang_detection", "to notice a hang"),
    ("teardown", "teardown", "to clear away what is left"),
    ("restore", "restore", "to read the state back from memory"),
    ("fetch", "fetch", "to read it back from durable storage"),
    ("replacement", "replacement", "to replace a lost node"),
    ("away", "away", "until a preempted job runs again"),
)
_SHARES: Final = ("node", "hang", "preemption")


def add_parser(commands: Any) -> Any:
    """The words of the command."""
    parser = commands.add_parser(
        "simulate", help="goodput of a planned run, before it is paid for", description=TEXT, epilog=END
    )
    add = parser.add_argument
    add("--dir", metavar="D", help="take costs and failure rate from the journal of this job")
    add("--preset", metavar="NAME", help=f"take the failure rate from a published run: {', '.join(PRESETS)}")
    add(
        "--gpus",
        metavar="N",
        type=int,
        help="scale the failure rate of the preset (default: llama3) to so many",
    )
    add("--mtbf", metavar="TIME", help="mean time between failures of the whole job")
    for name in _SHARES:
        what = {"node": "take a node and its memory", "hang": "are hangs", "preemption": "are preemptions"}[
            name
        ]
        add(f"--{name}-share", metavar="X", type=float, help=f"share of the failures that {what}, 0 to 1")
    add("--time", metavar="TIME", help="wall time of the run (default: the preset's, else 30d)")
    add("--steps", metavar="N", type=int, help="the run ends after so many steps")
    add("--snapshot-every", metavar="INTERVAL", help="as for `everstep run` (default: 30s)")
    add("--checkpoint-every", metavar="INTERVAL", help="as for `everstep run` (default: auto)")
    add("--peers", action="store_true", help="a lost node's snapshots are in another node's memory too")
    add("--max-failures", metavar="N", type=int, help="as for `everstep run` (default: 5)")
    costs = parser.add_argument_group("what things cost (measured with --dir, else the defaults)")
    for option, name, what in _COSTS:
        costs.add_argument(f"--{option}", metavar="TIME", help=f"{what} (default: {_default(name)})")
    add("--seed", metavar="N", type=int, default=0, help="of the failures (default: 0)")
    add(
        "--runs",
        metavar="N",
        type=int,
        default=5,
        help="simulate N times with seeds from --seed on (default: 5)",
    )
    add(
        "--sweep",
        action="store_true",
        help="try checkpoint intervals from 30s to 2h and auto, and mark the best",
    )
    add("-o", "--output", metavar="FILE", help="draw the sweep to FILE.svg or FILE.html")
    add("--json", action="store_true", help="for programs")
    return parser


def answer(given: Mapping[str, Any]) -> int:
    """Carry it out. Raises UsageError."""
    from launch import plot, simulated
    from launch.tables import print_json

    output = None if given["output"] is None else Path(given["output"])
    if output is not None and not given["sweep"]:
        raise UsageError("--output draws a sweep: give --sweep too")
    plot.check_file(output)
    study = _study(given)
    if given["sweep"]:
        tried = {every: _runs(replace_checkpoints(study, every)) for every in (*SWEEP, "auto")}
        best = max(tried, key=lambda every: simulated.mean(tried[every]))
        if output is not None:
            simulated.draw(output, tried, best)
        document = {
            "assumptions": simulated.assumptions(study), "best": best,
            "sweep": {every: simulated.to_json(outcomes) for every, outcomes in tried.items()},
        }  # fmt: skip
        print_json(document) if given["json"] else print(simulated.sweep_text(study, tried, best))
        return 0
    outcomes = _runs(study)
    if given["json"]:
        print_json({"assumptions": simulated.assumptions(study), **simulated.to_json(outcomes)})
    else:
        print(simulated.text(study, outcomes))
    return 0


# --------------------------------------------------------------------------- what is asked


@dataclass(frozen=True, kw_only=True)
class Study:
    """One question: a plan, costs, and how often what strikes."""

    plan: Plan
    costs: Costs
    measured: frozenset[str]  # the costs that a job's journal has told
    mtbf: float
    shares: Mapping[Blow, float]
    source: str
    seeds: range


def _study(given: Mapping[str, Any]) -> Study:
    from supervisor.decide.scenario import Blow, Costs, Plan
    from supervisor.model import Limits

    if given["dir"] is not None and given["preset"] is not None:
        raise UsageError("--dir and --preset both say how often something fails: give one of them")
    if given["runs"] < 1:
        raise UsageError(f"--runs {given['runs']}: at least 1")
    seen = None if given["dir"] is None else _measured(Path(given["dir"]).expanduser().absolute())
    preset = None if given["preset"] is None else _preset(given["preset"])
    if given["gpus"] is not None and preset is None and seen is None and given["mtbf"] is None:
        preset = _preset("llama3")
    mtbf, source = _mtbf(given, seen, preset)
    costs = {"step": 1.0, **({} if seen is None else seen.costs)}
    for option, name, _ in _COSTS:
        if (seconds := _time(given, option)) is not None:
            costs[name] = seconds
    seconds = _time(given, "time")
    if seconds is None and given["steps"] is None:
        seconds = 30 * DAY if given["preset"] is None else _preset(given["preset"]).days * DAY
    try:
        study = Study(
            plan=Plan(
                seconds=seconds,
                steps=given["steps"],
                snapshot_every=_every(
                    given, "snapshot-every", costs["step"], seen.snapshot_every if seen else 30.0
                ),
                checkpoint_every=_every(given, "checkpoint-every", costs["step"], "auto"),
                peers=given["peers"],
                limits=Limits()
                if given["max_failures"] is None
                else Limits(max_failures=given["max_failures"]),
            ),
            costs=Costs(**costs),
            measured=frozenset(seen.costs if seen else ())
            - {n for o, n, _ in _COSTS if given[_key(o)] is not None},
            mtbf=mtbf,
            shares=_shares(given, seen, preset),
            source=source,
            seeds=range(given["seed"], given["seed"] + given["runs"]),
        )
    except ValueError as error:
        raise UsageError(str(error)) from None
    if sum(study.shares[blow] for blow in Blow if blow is not Blow.PROCESS) > 1 + 1e-9:
        raise UsageError("the shares of --node-share, --hang-share and --preemption-share sum to more than 1")
    return study


def _measured(job: Path) -> Measured:
    from supervisor.decide.measured import measure
    from supervisor.edge.journal import Reader

    try:
        if not (job / "journal").is_dir():
            raise JobError(f"no job in {job.absolute()}")
    except OSError as error:
        raise JobError(f"{error.filename}: {error.strerror}") from None
    problems: list[str] = []
    seen = measure(Reader(job / "journal", problems.append).facts())
    if "step" not in seen.costs:
        raise UsageError(f"{job}: the job has made no steps yet, so nothing can be learned from it")
    return seen


def _preset(name: str) -> Preset:
    if name not in PRESETS:
        raise UsageError(f"--preset {name}: allowed are {', '.join(PRESETS)}")
    return PRESETS[name]


def _mtbf(given: Mapping[str, Any], seen: Measured | None, preset: Preset | None) -> tuple[float, str]:
    from launch import simulated

    gpus = given["gpus"]
    if gpus is not None and gpus < 1:
        raise UsageError(f"--gpus {gpus}: at least 1")
    if (mtbf := _time(given, "mtbf")) is not None:
        if not mtbf > 0:
            raise UsageError("--mtbf: longer than 0")
        return mtbf, "as given"
    if preset is not None:
        scaled = "" if gpus in (None, preset.gpus) else f", scaled to {gpus:,} GPUs"
        return preset.gpu_mtbf / (gpus or preset.gpus), preset.source + scaled
    if seen is not None:
        if seen.mtbf is None:
            return math.inf, "as measured: nothing has failed yet"
        return (
            seen.mtbf,
            f"as measured: {sum(seen.blows.values())} in {simulated.span(seen.record.spent.supervised)}",
        )
    raise UsageError("how often does something fail? give --mtbf TIME, --preset NAME, --gpus N or --dir D")


def _shares(given: Mapping[str, Any], seen: Measured | None, preset: Preset | None) -> dict[Blow, float]:
    from supervisor.decide.scenario import Blow

    known = dict.fromkeys(Blow, 0.0)
    if seen is not None and seen.blows:
        total = sum(seen.blows.values())
        known |= {blow: count / total for blow, count in seen.blows.items()}
    elif preset is not None:
        known[Blow.NODE] = preset.node_share
    for name in _SHARES:
        value = given[f"{name}_share"]
        if value is not None:
            if not 0 <= value <= 1:
                raise UsageError(f"--{name}-share {value:g}: from 0 to 1")
            known[Blow(name)] = value
    return known


def _key(option: str) -> str:
    return option.replace("-", "_")


def _time(given: Mapping[str, Any], option: str) -> float | None:
    from supervisor.intervals import parse_duration

    text = given[_key(option)]
    if text is None:
        return None
    try:
        return 0.0 if text == "0" else parse_duration(text)
    except ConfigError as error:
        raise UsageError(f"--{option}: {error}") from None


def _every(given: Mapping[str, Any], option: str, step: float, default: Any) -> Any:
    from supervisor.intervals import Interval

    if given[_key(option)] is None:
        return default
    try:
        interval = Interval.parse(given[_key(option)], auto=option == "checkpoint-every")
    except ConfigError as error:
        raise UsageError(f"--{option}: {error}") from None
    if interval.is_auto:
        return "auto"
    return interval.seconds if interval.steps is None else interval.steps * step


def _default(name: str) -> str:
    from supervisor.decide.scenario import Costs

    return "1s" if name == "step" else f"{next(f.default for f in fields(Costs) if f.name == name):g}s"


# --------------------------------------------------------------------------- running it


def replace_checkpoints(study: Study, every: str) -> Study:
    """The same with another ``--checkpoint-every``."""
    from supervisor.intervals import parse_duration

    seconds = every if every == "auto" else parse_duration(every)
    return replace(study, plan=replace(study.plan, checkpoint_every=seconds))


def strikes(study: Study, seed: int) -> Iterator[Strike]:
    """What strikes, and when: a Poisson process, the same for a seed whatever the plan is."""
    from supervisor.decide.scenario import Blow, Strike

    if math.isinf(study.mtbf):
        return
    chance, now = random.Random(seed), 0.0
    while True:
        now += chance.expovariate(1 / study.mtbf)
        drawn, blow = chance.random(), Blow.PROCESS
        for one in (Blow.NODE, Blow.HANG, Blow.PREEMPTION):
            if drawn < study.shares[one]:
                blow = one
                break
            drawn -= study.shares[one]
        yield Strike(now, blow)


def _runs(study: Study) -> list[Outcome]:
    from supervisor.decide.simulation import simulate

    return [simulate(study.plan, study.costs, strikes(study, seed)) for seed in study.seeds]
