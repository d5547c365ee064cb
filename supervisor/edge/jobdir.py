"""The job's directory and its runtime directory: who holds them, what they are called, how they are made.

One supervisor owns a job at a time, by an ``flock`` on ``D/lock`` that dies with it. Each owner takes the next *epoch*,
written to ``D/job.json`` before anything else; a commit re-reads it, so an older owner that the lock could not
stop (a file system without locks between hosts) can no longer commit.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from supervisor.edge import clock
from supervisor.errors import JobError, StorageError

FORMAT = 1
LOCK_PATIENCE = 0.5  # seconds; `everstep status` looks at the lock for microseconds
_SURELY_LAID_OUT = 3600.0  # seconds after it was made, a runtime directory has something in it
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # e.g. Lustre mounted without flock
OWNER, MEMBER = "job", "member"  # files that name the job directory, where the job leads back here or not
SMALL_TMPFS = 512 << 20  # bytes; a container's default /dev/shm is 64 MiB


@dataclass(frozen=True)
class JobFile:
    """``D/job.json``."""

    run_id: str
    runtime: str
    epoch: int
    identity: str  # what may not change between runs: the script or module
    command: list[str]
    created: float
    format: int = FORMAT
    host: str = ""  # whose supervisor opened this epoch


class JobDirectory:
    """The paths of one job. Nothing is created before ``claim``."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.journal = self.path / "journal"
        self.attempts = self.path / "attempts"
        self.file = self.path / "job.json"
        #: why the directory could not be locked: then the epoch alone fences rivals
        self.unlocked: str | None = None

    def attempt(self, number: int) -> Path:
        """Where the logs and the evidence of one attempt lie."""
        return self.attempts / f"{number:06d}"

    def logs(self, number: int) -> Path:
        """One log per rank, named ``rank-<global rank>.log``, and torchrun's own."""
        return self.attempt(number) / "logs"

    def read(self) -> JobFile | None:
        """The job file, or None where no job lies. Raises JobError for a file that is not ours."""
        try:
            raw = json.loads(self.file.read_text())
            if raw["format"] > FORMAT:
                raise JobError(
                    f"{self.file}: written by a newer everstep (format {raw['format']}, this one knows {FORMAT})"
                )
            known = {field.name for field in fields(JobFile)}  # a newer minor version may say more
            return JobFile(**{name: value for name, value in raw.items() if name in known})
        except FileNotFoundError:
            return None
        except OSError as error:
            raise JobError(f"{self.file}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise JobError(f"{self.file}: not a job file ({error})") from None

    @contextlib.contextmanager
    def claim(self) -> Iterator[None]:
        """Hold the job's lock; raises JobError naming the holder, or why the directory cannot be used."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = open(self.path / "lock", "a+")  # noqa: SIM115 (held to the end)
        except OSError as error:
            raise JobError(f"job directory {self.path}: {error.strerror}") from None
        with handle:
            deadline = clock.monotonic() + LOCK_PATIENCE
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if error.errno in _NO_LOCKS:
                        self.unlocked = error.strerror
                        break
                    if error.errno not in (errno.EAGAIN, errno.EACCES):
                        raise JobError(f"{self.path}/lock: {error.strerror}") from None
                    if clock.monotonic() > deadline:
                        handle.seek(0)
                        holder = handle.read().strip() or "another supervisor"
                        raise JobError(f"{self.path} is in use: {holder}") from None
                    time.sleep(0.02)
            handle.truncate(0)
            started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime())
            handle.write(f"everstep run, pid {os.getpid()} on {socket.gethostname()}, since {started}\n")
            handle.flush()
            yield

    def check(self, identity: str) -> None:
        """Raise JobError when the directory holds the job of another program.

        A script of the same name in another place is the same one if it has gone from where it was.
        """
        old = self.read()
        if old is None or old.identity == identity:
            return
        moved = Path(old.identity).name == Path(identity).name and not os.path.exists(old.identity)
        if not moved:
            raise JobError(
                f"{self.path} holds the job of {old.identity}, not of {identity}: give another --dir"
            )

    def open_epoch(self, identity: str, command: list[str], node: str | None = None) -> JobFile:
        """Take the job (or make it) for a new epoch. The caller holds the lock. ``node``: its name, where there are several."""
        self.check(identity)
        old = self.read()
        if old is None:
            run_id = secrets.token_hex(8)
            runtime = make_runtime(run_id, node)
            new = JobFile(run_id, str(runtime), 1, identity, command, clock.now(), host=socket.gethostname())
        else:
            run_id, runtime = old.run_id, Path(old.runtime)
            if self._is_a_copy(runtime):
                run_id = secrets.token_hex(8)
                runtime = make_runtime(run_id, node)
            elif not _is_private(runtime) or runtime.name.partition("@")[2] != (node or ""):
                runtime = make_runtime(run_id, node)
            new = replace(
                old,
                run_id=run_id,
                epoch=old.epoch + 1,
                runtime=str(runtime),
                identity=identity,
                command=command,
                host=socket.gethostname(),
            )
        try:
            temporary = self.file.with_suffix(".tmp")
            with open(temporary, "w") as handle:
                json.dump(asdict(new), handle, indent=1)
                handle.flush()
                os.fsync(handle.fileno())
            temporary.rename(self.file)
        except OSError as error:
            raise JobError(f"{self.file}: {error.strerror}") from None
        return new

    def _is_a_copy(self, runtime: Path) -> bool:
        """Whether the runtime directory belongs to another job directory, which this one was copied from (or to)."""
        try:
            owner = Path((runtime / OWNER).read_text())
        except OSError:
            return False
        return owner != self.path and (owner / "job.json").exists()

    def fence(self, epoch: int) -> None:
        """Raise StorageError when a newer supervisor has taken the job."""
        current = self.read()
        if current is not None and current.epoch != epoch:
            raise StorageError(
                f"a newer supervisor (epoch {current.epoch}) owns {self.path}: epoch {epoch} must not commit"
            )


def make_runtime(run_id: str, node: str | None = None) -> Path:
    """The job's runtime directory on this node: in tmpfs where that is big enough, owned by the user alone.

    ``node``: its name, where a job runs on several.
    """
    root = Path("/dev/shm") if _tmpfs_is_fit() else Path(tempfile.gettempdir())
    mine = root / f"everstep-{os.getuid()}"
    mine.mkdir(mode=0o700, exist_ok=True)
    if not _is_private(mine):
        raise JobError(f"{mine} belongs to somebody else or is open to others: remove it")
    runtime = mine / (run_id[:12] if node is None else f"{run_id[:12]}@{node}")
    runtime.mkdir(mode=0o700, exist_ok=True)
    return runtime


def is_in_memory(runtime: Path) -> bool:
    """Whether the runtime directory lies in tmpfs, not in the fallback on disk."""
    return runtime.is_relative_to("/dev/shm")


def lay_out_runtime(
    runtime: Path, job: Path, epoch: int = 0, engine: str = "", *, follows: bool = False
) -> None:
    """Make the control and slot folders; what an earlier supervisor left there stays (its snapshots are wanted).

    ``epoch``: of the supervisor that uses it. ``engine``: what gave the job its time, for those who clean up after it.
    ``follows``: it is that of a node which does not lead the job, so that the job's file does not name it.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    stamp = runtime / "boot"
    if stamp.exists() and stamp.read_text() != boot:
        remove_runtime(runtime)  # on disk, and cut off by a reboot: nothing of it was synced
        runtime.mkdir(mode=0o700, exist_ok=True)
    shutil.rmtree(runtime / "control", ignore_errors=True)
    for name in ("control", "slots/0", "slots/1", "slots/2"):
        if (runtime / name).is_symlink() and not (runtime / name).is_dir():
            (runtime / name).unlink()  # a slot that was moved to disk, and swept there by somebody
        (runtime / name).mkdir(mode=0o700, parents=True, exist_ok=True)
    stamp.write_text(boot)
    (runtime / (OWNER, MEMBER)[follows]).write_text(str(job))
    (runtime / (MEMBER, OWNER)[follows]).unlink(missing_ok=True)
    (runtime / "epoch").write_text(str(epoch))
    (runtime / "engine").write_text(engine)


def move_slot_to_disk(slot: Path) -> str | None:
    """Let the slot lie in the temporary directory from now on, where it lay in memory; where, or None if it stays."""
    if not is_in_memory(slot) or slot.is_symlink() or Path(tempfile.gettempdir()).is_relative_to("/dev/shm"):
        return None
    place = tempfile.mkdtemp(prefix=f"everstep-{os.getuid()}-slot-")
    shutil.rmtree(slot, ignore_errors=True)
    slot.symlink_to(place)
    return place


def remove_runtime(runtime: Path) -> None:
    """Leave nothing in this node's memory."""
    for slot in runtime.glob("slots/*"):
        if slot.is_symlink():
            shutil.rmtree(slot.resolve(), ignore_errors=True)
    shutil.rmtree(runtime, ignore_errors=True)


def sweep_runtimes(keep: Path) -> None:
    """Remove runtime directories of jobs whose own directory is gone, or that have moved on to another one or another host."""
    for runtime in keep.parent.iterdir():
        owner, member = runtime / OWNER, runtime / MEMBER
        follows = member.is_file()
        if runtime == keep:
            continue
        if not (follows or owner.is_file()):
            _remove_if_forgotten(runtime)
            continue
        try:
            job = JobDirectory(Path((member if follows else owner).read_text()))
            file = job.read()
        except (OSError, JobError):
            continue  # cannot tell: not ours to remove
        if (
            file is not None and follows
        ):  # it may be alive, or be wanted, as long as the job runs on several nodes
            gone = "@" not in file.runtime and _is_older(file, runtime)
        elif file is not None:
            gone = file.runtime != str(runtime) or _runs_elsewhere(file, runtime)
        else:  # deleted, or merely not mounted at present?
            gone = not job.path.exists() and job.path.parent.is_dir() and any(job.path.parent.iterdir())
        if gone:
            remove_runtime(runtime)


def _remove_if_forgotten(runtime: Path) -> None:
    """An empty directory, of a supervisor that was killed before it laid it out."""
    with contextlib.suppress(OSError):  # it is not empty, or has gone
        if clock.now() - runtime.stat().st_mtime > _SURELY_LAID_OUT:
            runtime.rmdir()


def _runs_elsewhere(file: JobFile, runtime: Path) -> bool:
    """Whether a later supervisor of the job, on another host, has gone on without what lies here."""
    return file.host not in ("", socket.gethostname()) and _is_older(file, runtime)


def _is_older(file: JobFile, runtime: Path) -> bool:
    """Whether a later supervisor has had the job since."""
    try:
        return file.epoch > int((runtime / "epoch").read_text())
    except (OSError, ValueError):
        return False


def _tmpfs_is_fit() -> bool:
    try:
        usage = os.statvfs("/dev/shm")
    except OSError:
        return False
    return usage.f_blocks * usage.f_frsize >= SMALL_TMPFS and os.access("/dev/shm", os.W_OK)


def _is_private(path: Path) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return status.st_uid == os.getuid() and not status.st_mode & 0o077
