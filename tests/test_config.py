"""Options: where they come from, which values are allowed, and the one line for each that is not."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

from supervisor import config, vigil
from supervisor.config import Options, load
from supervisor.decide.retention import KeepBest, Mode
from supervisor.errors import ConfigError
from supervisor.flags.reading import Group
from supervisor.intervals import Interval, Unit


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("1step", Unit.STEPS, 1),
        ("50steps", Unit.STEPS, 50),
        (" 50 Steps ", Unit.STEPS, 50),
        ("10s", Unit.SECONDS, 10),
        ("0.5s", Unit.SECONDS, 0.5),
        ("5m", Unit.SECONDS, 300),
        ("1h", Unit.SECONDS, 3600),
        ("never", Unit.NEVER, 0),
        ("auto", Unit.AUTO, 0),
    ],
)
def test_intervals(text: str, unit: Unit, value: float) -> None:
    interval = Interval.parse(text, auto=True)
    assert (interval.unit, interval.value) == (unit, value)
    assert Interval.parse(str(interval), auto=True) == interval
    assert interval.steps == (value if unit is Unit.STEPS else None)
    assert interval.seconds == (value if unit is Unit.SECONDS else None)
    assert interval.is_never == (unit is Unit.NEVER)
    assert interval.is_auto == (unit is Unit.AUTO)


@pytest.mark.parametrize(
    "text", ["", "5", "s", "-1s", "0s", "0steps", "1.5steps", "1e3s", "5 sec", "auto", "nan", "١s"]
)
def test_no_intervals(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Interval.parse(text)
    assert repr(text) in str(caught.value)


def test_the_defaults_are_those_of_the_documentation(tmp_path: Path) -> None:
    options = load({}, tmp_path)
    assert options == Options()
    assert str(options.snapshot_every) == "30s"
    assert str(options.checkpoint_every) == "auto"
    assert (options.keep_last, options.max_failures, options.max_preemptions, options.grace) == (
        3,
        5,
        100,
        60.0,
    )


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "everstep.yaml").write_text(
        "snapshot-every: 50steps\nkeep_last: 7\nkeep-best: loss:min:2\nquiet: true\ncontinue: true\ngrace: 2m\n"
    )
    options = load({"keep_last": "9", "quiet": False}, tmp_path)
    assert options.keep_last == 9
    assert options.snapshot_every.steps == 50
    assert options.keep_best == KeepBest(metric="loss", mode=Mode.MIN, count=2)
    assert (options.quiet, options.continue_, options.grace) == (False, True, 120)
    assert options.config == tmp_path / "everstep.yaml"
    assert options.retention.keep_last == 9


def test_standby(tmp_path: Path) -> None:
    assert (load({}, tmp_path).standby, load({}, tmp_path).standby_memory) == ("on", None)
    options = load({"standby": "Init", "standby_memory": "1.5GB"}, tmp_path)
    assert (options.standby, options.standby_memory) == ("init", 1_500_000_000)
    (tmp_path / "everstep.yaml").write_text("standby: off\nstandby-memory: 0B\n")
    assert (load({}, tmp_path).standby, load({}, tmp_path).standby_memory) == ("off", 0)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"standby": "deep"}, "--standby: 'deep'; allowed: on, off, init"),
        ({"standby_memory": "2"}, "--standby-memory: '2' is no amount of memory; allowed: 500MB, 2GB, 0B"),
        ({"standby_memory": "2GB/s"}, "--standby-memory: '2GB/s' is no amount of memory"),
        ({"standby_memory": "much"}, "--standby-memory: 'much' is no amount of memory"),
    ],
)
def test_no_standby(tmp_path: Path, flags: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        load(flags, tmp_path)


def test_limits_of_hangs(tmp_path: Path) -> None:
    options = load({}, tmp_path)
    assert (options.hang, options.hang_floor, options.hang_silence) == ("auto", None, None)
    options = load({"hang": "5m", "hang_floor": "90s", "hang_silence": "10m", "hang_startup": "1h"}, tmp_path)
    assert (options.hang, options.hang_floor, options.hang_silence) == (300, 90, 600)
    assert options.hang_startup == 3600
    assert load({"hang_silence": "never"}, tmp_path).hang_silence is None
    (tmp_path / "everstep.yaml").write_text("hang: off\nhang-ceiling: 5m\n")
    assert load({}, tmp_path).hang == "off"
    assert vigil.describe(load({}, tmp_path)) == "hangs are not looked for"
    (tmp_path / "everstep.yaml").write_text("hang: on\nhang-silence: 10m\n")
    assert vigil.describe(load({}, tmp_path)) == (
        "limits of hangs: 10 times the longest step, at least 60 s (600 s without a Session), at most 1800 s; "
        "1800 s up to the first step, 1800 s for an evaluation; no output for 600 s is a hang"
    )
    assert "300 s for a step" in vigil.describe(load({"hang": "5m"}, tmp_path))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"hang": "soon"}, "--hang: 'soon'; allowed: auto, off, or a time"),
        ({"hang": "0s"}, "allowed: auto, off, or a time of 1s or longer"),
        ({"hang_floor": "0.5s"}, "--hang-floor: 0.5s: 1s or longer"),
        ({"hang_floor": "10m", "hang_ceiling": "5m"}, "--hang-floor 600s is longer than --hang-ceiling 300s"),
        ({"hang_startup": "long"}, "--hang-startup: 'long' is no duration"),
    ],
)
def test_wrong_limits_of_hangs(tmp_path: Path, flags: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        load(flags, tmp_path)


def test_directories(tmp_path: Path) -> None:
    assert load({"dir": "d"}, tmp_path).checkpoints_directory == Path("d/checkpoints")
    assert load({"dir": "d", "checkpoints": "/x"}, tmp_path).checkpoints_directory == Path("/x")
    assert load({"dir": "~/d"}, tmp_path).dir == Path.home() / "d"
    with pytest.raises(ConfigError):
        _ = Options().checkpoints_directory


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "snapshot_evry: 5s",
            "unknown key 'snapshot_evry' (did you mean snapshot-every?); allowed: checkpoint-bandwidth, ",
        ),
        ("zzz: 1", "unknown key 'zzz'; allowed:"),
        ("continue_: true", "unknown key 'continue_'"),
        ("config: other.yaml", "unknown key 'config'"),
        ("3: 1", "unknown key 3"),
        ("keep-last: 1\nkeep_last: 2", "keep-last is given twice"),
        ("keep_last: many", "keep_last: 'many' (a str) is no whole number"),
        ("keep_last: 1.5", "keep_last: 1.5 (a float) is no whole number"),
        ("keep_last: true", "keep_last: True (a bool) is no whole number"),
        ("keep_last:", "keep_last: nothing is no whole number"),
        ("keep_last: 0", "keep_last of 0: at least 1"),
        ("quiet: 1", "quiet: 1 (a int) is neither true nor false"),
        ("dir: 3", "dir: 3 (a int) is no text"),
        ("dir: ''", "dir: a path is required"),
        ("name: a/b", "--name 'a/b'"),
        ("snapshot-every: 30", "snapshot-every: 30 has no unit; allowed: 1step, 50steps, 10s"),
        ("checkpoint_every: 30", "checkpoint_every: 30 has no unit; allowed: auto, 1step"),
        ("snapshot-every: auto", "'auto' is no interval"),
        ("snapshot-every: [1]", "[1] (a list) is no text"),
        ("grace: 60", "grace: 60 has no unit"),
        ("grace: 0s", "--grace 0s: longer than 0"),
        ("max-failures: -1", "--max-failures -1: at least 0"),
        ("keep-best: loss", "keep-best: keep_best of 'loss': METRIC:min|max:M"),
        ("keep-every: 0", "keep_every of 0 steps"),
        (
            "checkpoints: ftp://b/x",
            "checkpoints: ftp://b/x: ftp:// is not supported; allowed: a path, s3://bucket/prefix",
        ),
        ("checkpoints: s3:///x", "no bucket is named; allowed: s3://bucket/prefix"),
        ("checkpoints: s3://b/../x", "only a bucket and a plain prefix are allowed"),
        ("checkpoint-bandwidth: 200", "no bandwidth; allowed: 500KB, 200MB"),
        ("checkpoint-bandwidth: 0MB", "no bandwidth"),
        ("storage-timeout: 0s", "--storage-timeout 0s: longer than 0"),
        ("checkpoint-every: never\nkeep-every: 5", "--keep-every has nothing to keep"),
        ("checkpoint-every: 10steps\nsnapshot-every: 50steps", "contradicts --snapshot-every 50steps"),
        ("dir: d\ncheckpoints: d", "is the job directory itself"),
        ("- a", "a mapping of options is required, not a list"),
        ("a: [1\nb: 2", "line 2: "),
        ("a: !!python/object:os.system x", "line 1: could not determine a constructor"),
        ("a: \x01", "not YAML: "),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(text + "\n")
    with pytest.raises(ConfigError) as caught:
        load({"config": str(file)})
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    assert said in message
    assert "\n" not in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        load({"config": str(tmp_path / "none.yaml")})
    with pytest.raises(ConfigError, match="Is a directory"):
        load({"config": str(tmp_path)})
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load({"config": str(tmp_path / "binary")})
    (tmp_path / "everstep.yaml").write_text("")
    assert load({}, tmp_path).keep_last == 3


def test_wrong_flags_are_named_as_flags(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--keep-last: 'x' \(a str\) is no whole number"):
        load({"keep_last": "x"}, tmp_path)
    with pytest.raises(ConfigError, match="^--snapshot-every: '5' is no interval"):
        load({"snapshot_every": "5"}, tmp_path)


def test_a_checkpoint_interval_shorter_than_the_default_snapshots_is_no_contradiction(tmp_path: Path) -> None:
    assert load({"checkpoint_every": "10s"}, tmp_path).checkpoint_every.seconds == 10


def test_every_option_can_be_read_and_says_what_it_is() -> None:
    names = [field.name for field in dataclasses.fields(Options)]
    assert set(names) == {*config.READERS, "config"}
    groups = [group for group in Options.__mro__ if issubclass(group, Group)]
    lines = [line for group in groups for line in inspect.getsource(group).splitlines()]
    for name in names:
        at = next(number for number, line in enumerate(lines) if line.startswith(f"    {name}: "))
        assert lines[at + 1].lstrip().startswith('"""')
