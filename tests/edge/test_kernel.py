"""The kernel's calls are there whether Python was built with them or not."""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess

import pytest

from supervisor.edge import kernel


@pytest.fixture(params=["with", "without"], autouse=True)
def python(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "without":
        monkeypatch.delattr(os, "pidfd_open")
        monkeypatch.delattr(os, "memfd_create")
        monkeypatch.delattr(signal, "pidfd_send_signal")


def test_a_process_is_held_and_signalled() -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        pidfd = kernel.pidfd_open(process.pid)
        assert not os.get_inheritable(pidfd)
        assert not select.select([pidfd], [], [], 0)[0]
        kernel.pidfd_send_signal(pidfd, signal.SIGTERM)
        assert select.select([pidfd], [], [], 60)[0]
        assert process.wait() == -signal.SIGTERM
        with pytest.raises(ProcessLookupError):
            kernel.pidfd_send_signal(pidfd, signal.SIGTERM)
    with pytest.raises(ProcessLookupError):
        kernel.pidfd_open(process.pid)
    os.close(pidfd)


def test_a_file_in_memory() -> None:
    fd = kernel.memfd("everstep-test")
    assert not os.get_inheritable(fd)
    os.write(fd, b"12")
    assert os.pread(fd, 9, 0) == b"12"
    assert "everstep-test" in os.readlink(f"/proc/self/fd/{fd}")
    os.close(fd)


def test_a_machine_of_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    monkeypatch.setattr("platform.machine", lambda: "abacus")
    with pytest.raises(OSError, match=os.strerror(errno.ENOSYS)):
        kernel.memfd("everstep-test")
