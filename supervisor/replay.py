"""A job's journal folded into its record, and the point from which the next reader can go on.

The journal is the truth and is never cut. But a month of training is hundreds of thousands of facts, which nobody should
decode to learn how a job stands. So the owner writes what it has folded beside the journal, now and then and when it
leaves, as ``journal/fold.json``: the record and how far each file was read. Who folds from there gets what it would get
from the whole journal, because

- it was folded by the same rules: a digest of their source is in the file, and another everstep starts from the beginning;
- the journal still begins with what was folded, and what comes after belongs behind it (``Reader`` checks both);
- only whole lines that the kernel took are in it, in the order in which a reader would merge them. An owner whose
  journal is in another state (the disk refused a line, its clock lags behind an earlier node's) writes none.

Whatever does not fit is passed over, and the whole journal is read, as a stream. The file can be deleted at any time.
"""

from __future__ import annotations

import functools
import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from supervisor import failing, model, record, timesheet
from supervisor.about import version
from supervisor.checkpoint.location import Location, located
from supervisor.decide import goodput, lifecycle, rollback
from supervisor.edge import journal, plain
from supervisor.edge.journal import OutOfOrderError, Place, Reader
from supervisor.errors import ProtocolError
from supervisor.model import CheckpointCommitted, CheckpointRejected, Fact, Resumed, Tier
from supervisor.record import JobRecord

FILE: Final = "fold.json"
MOST_PROBLEMS: Final = 100
MOST_VERDICTS: Final = 256


@dataclass(kw_only=True)
class _Fold:
    """What ``fold.json`` holds."""

    rules: int
    record: JobRecord = lifecycle.NEW_JOB
    problems: tuple[str, ...] = ()
    checkpoints: str | None = None
    verdicts: dict[str, bool] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    newest_time: float = float("-inf")
    newest_file: str = ""


class Replay:
    """A journal folded as far as it has been read: nothing before the first ``advance``."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._in_order = True
        self._begin(_load(directory / FILE) or _Fold(rules=_rules()))
        #: facts folded that no file beside the journal knows
        self.unsaved = 0

    @property
    def record(self) -> JobRecord:
        """The job."""
        return self._fold.record

    @property
    def problems(self) -> tuple[str, ...]:
        """Lines that could not be read and facts that cannot have happened: the first hundred."""
        return self._fold.problems

    @property
    def checkpoints(self) -> Location | None:
        """Where the checkpoint lies that was committed last, emergencies apart."""
        return None if self._fold.checkpoints is None else located(self._fold.checkpoints)

    @property
    def verdicts(self) -> dict[Location, bool]:
        """Checkpoint → whether its bytes were right when they were last compared; of the last few hundred."""
        return {located(path): good for path, good in self._fold.verdicts.items()}

    def advance(self) -> None:
        """Fold what is new in the journal. Raises JobError when it cannot be read."""
        if not self._reader.fits():
            self._begin(_Fold(rules=_rules()))
        try:
            self._read_on()
        except OutOfOrderError:
            self._begin(_Fold(rules=_rules()))
            self._read_on()

    def add(self, fact: Fact) -> None:
        """Fold a fact that its owner is about to write. Raises ProtocolError, and nothing changes, if it is impossible."""
        self._fold.record = lifecycle.apply(self._fold.record, fact)
        self._note(fact)
        self.unsaved += 1

    def wrote(self, file: str, fact: Fact, line: bytes) -> None:
        """``line`` of the ``fact`` that was added is at the end of ``file``."""
        place = self._fold.places.setdefault(file, Place())
        place.pass_over(line)
        place.newest = max(place.newest, fact.time)
        self._in_order = self._in_order and (place.newest, file) >= self._reader.newest
        self._reader.newest = place.newest, file

    def to_save(self, file: str, size: int) -> bytes | None:
        """The content of ``fold.json``, given the length of the owner's file; None while that is not what was folded."""
        if not self._in_order or self._fold.places.get(file, Place()).offset != size:
            return None
        self._fold.newest_time, self._fold.newest_file = self._reader.newest
        self.unsaved = 0
        return json.dumps(plain.to_plain(self._fold), allow_nan=False, separators=(",", ":")).encode()

    def _begin(self, fold: _Fold) -> None:
        self._fold = fold
        self._reader = Reader(
            self._directory, self._problem, fold.places, (fold.newest_time, fold.newest_file)
        )
        self.unsaved = 0

    def _read_on(self) -> None:
        for fact in self._reader.facts():
            self._note(fact)
            try:
                self._fold.record = lifecycle.apply(self._fold.record, fact)
            except ProtocolError as error:
                self._problem(str(error))
            self.unsaved += 1

    def _note(self, fact: Fact) -> None:
        """What is known of the checkpoints: one is compared byte by byte before an attempt resumes from it."""
        verdicts = self._fold.verdicts
        match fact:
            case CheckpointCommitted():  # written anew
                verdicts.pop(fact.path, None)
                if not fact.emergency:
                    self._fold.checkpoints = str(located(fact.path).parent)
            case CheckpointRejected():
                verdicts[fact.path] = False
            case Resumed(tier=Tier.CHECKPOINT, path=str(path)):
                verdicts[path] = True
        if len(verdicts) > MOST_VERDICTS:
            del verdicts[next(iter(verdicts))]

    def _problem(self, problem: str) -> None:
        if len(self._fold.problems) < MOST_PROBLEMS:
            self._fold.problems += (problem,)


def _load(path: Path) -> _Fold | None:
    try:
        fold = plain.from_plain(_Fold, json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return fold if fold.rules == _rules() else None


@functools.cache
def _rules() -> int:
    """Differs wherever the same journal might be folded into something else."""
    parts = (failing, model, record, timesheet, lifecycle, goodput, rollback, plain, journal)
    sources = [module.__file__ for module in parts]
    try:
        return zlib.crc32(b"".join(Path(source or "").read_bytes() for source in (*sources, __file__)))
    except OSError:  # compiled code alone
        return zlib.crc32(version().encode())
