"""``everstep checkpoints …``: from the words of the command line to the answer."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launch import contents, plot, stored
from launch.choosing import Best, Chosen, choose, locate
from supervisor import config
from supervisor.checkpoint.catalog import step_of
from supervisor.checkpoint.location import Location
from supervisor.checkpoint.manifest import Key
from supervisor.config import Options
from supervisor.errors import UsageError


def answer(given: Mapping[str, Any], find_job: Callable[[], Path], flags: Mapping[str, object]) -> int:
    """Carry out the action; the job is looked for only if needed, for a path needs none. Returns the exit code."""
    with contextlib.ExitStack() as stack:
        return _Asked(given, find_job, flags, stack).answer()


class _Asked:
    def __init__(
        self,
        given: Mapping[str, Any],
        find_job: Callable[[], Path],
        flags: Mapping[str, object],
        stack: contextlib.ExitStack,
    ) -> None:
        self._given = given
        self._flags = flags
        self._stack = stack
        self._job = functools.cache(find_job)
        self._options = functools.cache(self._load)

    def _load(self) -> Options:
        return config.load({**self._flags, "dir": str(self._job())})

    def _place(self) -> Location:
        return self._options().checkpoints or stored.checkpoints_of(self._job())

    def _best(self) -> Best:
        return Best.of(self._given["best"], self._options().keep_best)

    def _chosen(self, name: str) -> Chosen:
        return choose(self._given[name], self._place, self._best, Key.from_environment(), self._scratch)

    def _scratch(self) -> Path:
        """Room for a checkpoint that has to be fetched, until the answer is given."""
        return Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="everstep-")))

    def _drawn(self, *marked: Chosen) -> str | None:
        metric, output = self._given["plot"], self._given["output"]
        if metric is None:
            if output is not None:
                raise UsageError("-o is where --plot METRIC draws to: say which metric")
            return None
        file = None if output is None else Path(output)
        plot.check_file(file)
        steps = {step_of(one.where.name) for one in marked if one.where.parent == self._place()}
        rule = self._options().keep_best
        return stored.draw(self._place(), metric, file, best=self._given["best"], rule=rule, marked=steps)

    def answer(self) -> int:
        """The exit code."""
        given, json = self._given, self._given["json"]
        match given["action"]:
            case "list":
                line = self._drawn()
                code = stored.show_list(
                    self._job(), self._place(), json=json, verify=given["verify"], best=self._best()
                )
                if line is not None and not json:
                    print(line)
                return code
            case "verify":
                return self._verify()
            case "inspect":
                return contents.inspect(self._chosen("which"), only=given["only"], json=json)
            case "compare":
                a, b = self._chosen("a"), self._chosen("b")
                return contents.compare(
                    a, b, only=given["only"], weights_only=given["weights_only"], every=given["all"], json=json,
                    shape_of_metric=self._drawn(a, b),
                )  # fmt: skip
            case "export":
                return contents.export(
                    self._chosen("which"), Path(given["output"]), weights_only=given["weights_only"], only=given["only"],
                    max_shard_size=given["max_shard_size"], json=json,
                )  # fmt: skip
            case _:
                policy = self._options().retention
                return stored.prune(self._job(), self._place(), policy, json=json, dry_run=given["dry_run"])

    def _verify(self) -> int:
        words: list[str] = self._given["which"]
        steps = {int(word) for word in words if word.isascii() and word.isdigit()}
        paths: list[Location] = []
        for word in words:
            if not (word.isascii() and word.isdigit()):
                found = locate(word, self._place, self._best, Key.from_environment())
                paths.append(found if isinstance(found, Path) else found.path)
        return stored.verify(self._place, steps, paths, json=self._given["json"])
