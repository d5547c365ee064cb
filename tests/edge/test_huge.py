"""Mapped files: what lies in them, how long the mapping lasts, huge pages, and what cannot be read."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervisor.edge import huge

SIZE = 2 * huge.PAGE + 12345


@pytest.fixture
def fd() -> Iterator[int]:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        yield file.fileno()


def lines_of(address: int) -> list[str]:
    """What smaps says of the mapping that begins there."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    first = [number for number, line in enumerate(lines) if line.startswith(f"{address:x}-")]
    return lines[first[0] : first[0] + 25] if first else []


def test_what_is_written_is_in_the_file_and_the_other_way_round(fd: int) -> None:
    os.ftruncate(fd, SIZE)
    mapping = huge.Mapping(fd, SIZE, writable=True, populate=True)
    assert mapping.address % huge.PAGE == 0
    view = memoryview(mapping.buffer).cast("B")
    assert len(view) == SIZE
    view[SIZE - 5 :] = b"hello"
    assert os.pread(fd, 100, SIZE - 5) == b"hello"
    os.pwrite(fd, b"there", 7)
    assert bytes(huge.Mapping(fd, SIZE).buffer[7:12]) == b"there"


def test_it_lasts_as_long_as_somebody_uses_it(fd: int) -> None:
    os.pwrite(fd, b"x" * 5000, 0)
    mapping = huge.Mapping(fd, 5000)
    address, view = mapping.address, memoryview(mapping.buffer).cast("B")
    del mapping
    gc.collect()
    assert bytes(view[:3]) == b"xxx"
    del view
    gc.collect()
    assert not lines_of(address)


def test_no_other_address_is_taken(fd: int) -> None:
    os.ftruncate(fd, SIZE)

    def taken() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")

    before = taken()
    mapping = huge.Mapping(fd, SIZE)
    assert SIZE <= taken() - before < SIZE + huge.PAGE
    del mapping


def test_an_allocated_file_is_of_zeros_and_mapped_at_once(fd: int) -> None:
    done = huge.allocate(fd, SIZE)
    assert os.fstat(fd).st_size == SIZE
    assert os.pread(fd, SIZE, 0) == bytes(SIZE)
    mapping = huge.Mapping(fd, SIZE, populate=True)
    mapped = [line for line in lines_of(mapping.address) if line.startswith("ShmemPmdMapped")]
    assert int(mapped[0].split()[1]) == (2 * huge.PAGE // 1024 if done else 0)


def test_a_small_file_has_no_huge_page(fd: int) -> None:
    assert huge.allocate(fd, 5000)
    assert os.fstat(fd).st_blocks == 0
    assert os.pread(fd, 5001, 0) == bytes(5000)


def test_what_cannot_be_read_is_told_without_a_signal(fd: int) -> None:
    os.pwrite(fd, b"x" * 20000, 0)
    mapping = huge.Mapping(fd, 20000)
    readable = mapping.is_readable(5000, 15000)
    assert readable == (os.uname().release >= "5.14") or readable
    os.ftruncate(fd, 5000)
    assert not mapping.is_readable(10000, 10000)
    with pytest.raises(OSError, match="Bad file descriptor"):
        huge.Mapping(-2, 5000)
