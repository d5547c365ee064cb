"""The lab of hosts itself: what later tests take for granted."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import BIN, environment
from tests.hosts.lab import INTERFACE, WHY_NOT, Host, Lab, Process

#: one lab, in one process of several
pytestmark = [pytest.mark.xdist_group("hosts"), pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]

SERVER = """
import socket
server = socket.create_server(("", 7000))
print("ready", flush=True)
kept = []
while True:
    kept.append(server.accept()[0])
    kept[-1].sendall(b"here")
"""
CLIENT = """
import socket, sys
try:
    with socket.create_connection((sys.argv[1], 7000), timeout=float(sys.argv[2])) as one:
        print("yes" if one.recv(4) == b"here" else "no")
except OSError:
    print("no")
"""
#: keeps a connection, says what it hears on it: a byte, that it was closed, or nothing for a while
HOLDER = """
import socket, sys
one = socket.create_connection((sys.argv[1], 7000))
one.recv(4)
print("connected", flush=True)
one.settimeout(0.3)
while line := sys.stdin.readline():
    try:
        if line == "talk\\n":
            one.settimeout(60)
            one.sendall(b"x")
        print("closed" if not one.recv(4) else "data", flush=True)
    except OSError as error:
        print(type(error).__name__, flush=True)
"""


def python(host: Host, program: str, *arguments: object, stdin: int = subprocess.DEVNULL) -> Process:
    return host.popen([sys.executable, "-S", "-c", program, *arguments], stdin=stdin, stdout=subprocess.PIPE)


def serve(host: Host) -> Process:
    server = python(host, SERVER)
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    return server


def reaches(one: Host, other: Host, patience: float = 30.0) -> bool:
    return one.run(sys.executable, "-S", "-c", CLIENT, other.name, patience) == "yes\n"


def lost(one: Host, other: Host) -> bool:
    return not reaches(one, other, 0.2)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(3) as one:
        for host in one.hosts:
            serve(host)
        yield one


def test_a_host_is_a_machine_of_its_own(lab: Lab, tmp_path: Path) -> None:
    one, other = lab.hosts[:2]
    assert one.run("uname", "-n") == "h1\n"
    one.run("sh", "-c", "echo x > /dev/shm/x", cwd="/")
    assert one.run("ls", "/dev/shm") == "x\n"
    assert other.run("ls", "/dev/shm") == ""
    assert not Path("/dev/shm/x").exists()
    assert one.run("pwd", cwd=tmp_path) == f"{tmp_path}\n"
    assert one.run("sh", "-c", "echo $A", env={"PATH": os.environ["PATH"], "A": "b"}) == "b\n"
    sleeper = one.popen(["sleep", "777"])
    assert "777" in one.run("sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
    assert "777" not in other.run("sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
    sleeper.send_signal(signal.SIGTERM)
    assert sleeper.wait(60) == -signal.SIGTERM


def test_who_is_cut_off_is_reached_by_nobody_until_healed(lab: Lab) -> None:
    one, other, third = lab.hosts
    assert reaches(one, other)
    assert reaches(other, one)
    lab.cut(one)
    assert lost(other, one)
    assert lost(one, third)
    assert reaches(one, one)
    assert reaches(other, third)
    lab.heal(one)
    assert reaches(other, one)
    assert reaches(one, third)


def test_a_pair_that_is_cut_reaches_everybody_else(lab: Lab) -> None:
    one, other, third = lab.hosts
    lab.cut_pair(one, other)
    assert lost(one, other)
    assert lost(other, one)
    assert reaches(one, third)
    assert reaches(third, other)
    lab.heal_pair(one, other)
    assert reaches(one, other)
    assert reaches(other, one)


def test_a_slow_link_is_slow_both_ways(lab: Lab) -> None:
    """100 kB at 2 Mbit/s, of which 32 kB may go at once, take a quarter of a second at least."""
    one, other = lab.hosts[:2]
    lab.rate(one, 2)
    receive = """
import socket
server = socket.create_server(("", 7001))
print("ready", flush=True)
connection = server.accept()[0]
while connection.recv(65536): pass
"""
    send = """
import socket, sys, time
connection = socket.create_connection((sys.argv[1], 7001))
began = time.monotonic()
connection.sendall(bytes(100_000))
connection.shutdown(socket.SHUT_WR)
connection.recv(1)
print(time.monotonic() - began)
"""
    for sender, receiver in ((one, other), (other, one)):
        receiving = python(receiver, receive)
        assert receiving.stdout is not None
        assert receiving.stdout.readline() == b"ready\n"
        assert float(sender.run(sys.executable, "-S", "-c", send, receiver.name)) > 0.2
        assert receiving.wait(60) == 0
    lab.rate(one, None)
    assert "tbf" not in one.run("tc", "qdisc", "show", "dev", INTERFACE)


def test_a_crash_is_heard_by_nobody_and_leaves_nothing(lab: Lab) -> None:
    one, other = lab.hosts[:2]
    other.run("touch", "/dev/shm/snapshot")
    holder = python(one, HOLDER, other.name, stdin=subprocess.PIPE)
    assert holder.stdin is not None
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"connected\n"
    worker = other.popen(["sleep", "777"])
    other.crash()
    assert worker.wait(60) == -signal.SIGKILL
    holder.stdin.write(b"listen\n")
    holder.stdin.flush()
    assert holder.stdout.readline() == b"TimeoutError\n", "a machine without power closes no connection"
    assert lost(one, other)
    other.boot()
    assert other.run("ls", "/dev/shm") == ""
    holder.stdin.write(b"talk\n")
    holder.stdin.flush()
    assert holder.stdout.readline() == b"ConnectionResetError\n", "it knows nothing of its earlier life"
    serve(other)
    assert reaches(one, other)
    holder.kill()
    assert holder.wait(60) == -signal.SIGKILL


def test_hosts_join_and_labs_stand_side_by_side(lab: Lab) -> None:
    def fail() -> None:
        with Lab(1) as second:
            seen.append(second)
            fourth = second.join()
            serve(second.hosts[0])
            assert reaches(fourth, second.hosts[0])
            left.append(fourth.popen(["sleep", "777"]))
            left.append(second.hosts[0].popen(["sh", "-c", "trap '' TERM; sleep 777"]))
            raise ZeroDivisionError

    seen: list[Lab] = []
    left: list[Process] = []
    with pytest.raises(ZeroDivisionError):
        fail()
    assert [process.wait(60) for process in left] == [-signal.SIGKILL] * 2
    assert not seen[0].folder.exists()
    assert not any(host.is_up for host in seen[0].hosts)
    assert reaches(lab.hosts[1], lab.hosts[2])


def test_nothing_is_left_of_a_lab_whose_process_was_killed() -> None:
    program = """
import os
from tests.hosts.lab import INTERFACE, WHY_NOT, Host, Lab, Process
with Lab(1) as lab:
    lab.hosts[0].popen(["sleep", "777"])
    os.write(1, f"{lab.folder} {lab._switch} {lab.hosts[0].first}\\n".encode())
    os.kill(os.getpid(), 9)
"""
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder, *pids = killed.stdout.decode().split()
    shutil.rmtree(folder)  # files are all that it could not help leaving
    limit = time.monotonic() + 60
    for pid in pids:
        while Path(f"/proc/{pid}/cwd").exists():  # which the dead that nobody has buried yet have not
            assert time.monotonic() < limit
            time.sleep(0.01)


ALL_REDUCE = """
import os
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([float(dist.get_rank() + 1)])
dist.all_reduce(total)
print(os.uname().nodename, dist.get_rank(), total.item(), flush=True)
dist.destroy_process_group()
"""


def test_torchrun_trains_over_two_hosts(lab: Lab, tmp_path: Path) -> None:
    script = tmp_path / "all_reduce.py"
    script.write_text(ALL_REDUCE)
    hosts = lab.hosts[:2]
    logs = [tmp_path / host.name for host in hosts]
    launched = []
    for rank, host in enumerate(hosts):
        argv = [BIN / "torchrun", "--nnodes=2", f"--node-rank={rank}", f"--master-addr={hosts[0].address}",
                "--master-port=29500", "--nproc-per-node=1", script]  # fmt: skip
        with open(logs[rank], "wb") as log:
            env = environment() | {"GLOO_SOCKET_IFNAME": INTERFACE}
            launched.append(host.popen(argv, env, stdout=log, stderr=log))
    codes = [process.wait(240) for process in launched]
    output = [log.read_text() for log in logs]
    assert codes == [0, 0], output
    assert ["h1 0 3.0" in output[0], "h2 1 3.0" in output[1]] == [True, True], output
