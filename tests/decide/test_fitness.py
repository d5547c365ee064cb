"""Judgements of what a host is like: at each limit, on either side of it."""

from __future__ import annotations

import pytest

from supervisor.decide import fitness
from supervisor.decide.fitness import BucketProbe, DirectoryProbe, Finding, Level

OK, WARNING, BROKEN = Level.OK, Level.WARNING, Level.BROKEN
GB = 10**9
GOOD = DirectoryProbe(bytes=64 << 20, write=0.1, sync=0.1, free=GB, links=True, locks=True)


def directory(**changes: object) -> Finding:
    from dataclasses import replace

    return fitness.directory("job directory", "/here", replace(GOOD, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("finding", "level", "said"),
    [
        (fitness.shared_memory(64 * GB, 60 * GB, True, None), OK, "60 GB free of 64 GB"),
        (fitness.shared_memory(64 * GB, 60 * GB, True, 59 * GB), OK, "59 GB needed"),
        (fitness.shared_memory(64 * GB, 60 * GB, True, 61 * GB), WARNING, "need 61 GB"),
        (fitness.shared_memory(64 << 20, 64 << 20, True, None), WARNING, "too small"),
        (fitness.shared_memory(64 * GB, 60 * GB, False, None), WARNING, "not writable"),
        (fitness.shared_memory(None, 0, False, None), WARNING, "not there"),
        (fitness.memory(None, 20 * GB, None), OK, "no limit by a cgroup"),
        (fitness.memory(32 * GB, 20 * GB, 21 * GB), WARNING, "need 21 GB"),
        (fitness.memory(None, None, 21 * GB), OK, "unknown"),
        (fitness.open_files(None, None), OK, "unlimited"),
        (fitness.open_files(4096, 4096), OK, "4096"),
        (fitness.open_files(1024, 1 << 20), WARNING, "1024"),
        (fitness.open_files(255, 255), BROKEN, "255"),
        (fitness.processes(None), OK, "unlimited"),
        (fitness.processes(4095), WARNING, "4095"),
        (fitness.locked_memory(64 << 10, infiniband=False), OK, "65.5 KB"),
        (fitness.locked_memory(64 << 10, infiniband=True), WARNING, "InfiniBand"),
        (fitness.locked_memory(None, infiniband=True), OK, "unlimited"),
        (fitness.clock(0.0, None), BROKEN, "before 2025"),
        (fitness.clock(1.8e9, None), OK, "plausible"),
        (fitness.clock(1.8e9, 1.9), OK, "agrees"),
        (fitness.clock(1.8e9, 3.0), WARNING, "3.0 s behind"),
        (fitness.clock(1.8e9, -3.0), WARNING, "3.0 s ahead of"),
        (fitness.ports(40000, 32768, 60999), OK, "free"),
        (fitness.ports(40000, 40000, 40009), WARNING, "only 10"),
        (fitness.ports(None, 32768, 60999), BROKEN, "none can be bound"),
        (directory(), OK, "336 MB/s, fsync 100 ms, 1 GB free"),
        (directory(failed="fsync: Input/output error"), BROKEN, "/here: fsync: Input/output error"),
        (directory(locks=False), WARNING, "no locks"),
        (directory(links=False), WARNING, "no hard links"),
        (directory(sync=1.1), WARNING, "slow"),
        (directory(write=3.0), WARNING, "slow"),
        (fitness.bucket("s3://b", BucketProbe(speed=60e6)), OK, "60 MB/s, put-if-absent is honoured"),
        (fitness.bucket("s3://b", BucketProbe(speed=6e6)), WARNING, "slow"),
        (fitness.bucket("s3://b", BucketProbe(speed=60e6, conditional=False)), BROKEN, "overwrites"),
        (fitness.bucket("s3://b", BucketProbe(failed="403")), BROKEN, "s3://b: 403"),
        (fitness.torch("2.13.0+cpu", None, 0, None), OK, "2.13.0+cpu"),
        (fitness.torch("2.13.0+cu128", "12.8", 8, "550.54.15"), OK, "for CUDA 12.8, driver 550.54.15"),
        (fitness.torch("2.13.0+cu128", "12.8", 0, None), OK, "for CUDA 12.8"),
        (fitness.torch("2.13.0+cu128", "12.8", 8, None), BROKEN, "no driver"),
        (fitness.torch("2.13.0+cu130", "13.0", 8, "550.54.15"), BROKEN, "driver 550.54.15"),
        (fitness.torch("2.13.0+cpu", None, 8, "550.54.15"), WARNING, "8 GPUs here"),
        (fitness.torch("2.13.0+rocm6.4", None, 0, None), OK, "rocm"),
        (fitness.torch("2.10.1", None, 0, None), WARNING, "2.10.1"),
        (fitness.torch("2.16.0", None, 0, None), WARNING, "2.16.0"),
        (fitness.torch(None, None, 0, None), BROKEN, "not installed"),
    ],
)
def test_a_judgement(finding: Finding, level: Level, said: str) -> None:
    assert finding.level is level
    assert said in finding.found
    assert (finding.mend is None) == (level is OK)
    assert "\n" not in finding.found + (finding.mend or "")
