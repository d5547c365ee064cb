"""SLURM's client commands, each within a known time: a controller that is down would keep them waiting for ever."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from launch.slurm.shown import TIME_FORMAT, fields

PATIENCE: Final = 5.0  # seconds
_ATTEMPTS: Final = 2


@dataclass(frozen=True)
class Client:
    """``scontrol`` as it is found on PATH."""

    scontrol: str

    @classmethod
    def found(cls) -> Client | None:
        """None where there is none: in a container, say."""
        path = shutil.which("scontrol")
        return None if path is None else cls(path)

    def show(self, *what: str) -> str | None:
        """The answer of ``scontrol show``; None when there was none in time.

        Asked again once: signals to the whole job end a client that is at work, too.
        """
        for _ in range(_ATTEMPTS):
            code, output = self._call("--oneliner", "show", *what)
            if code == 0 and output:
                return output
        return None

    def requeue(self, job: int) -> str | None:
        """Have the job run again; None when SLURM took that, else what it said.

        It answers by ending the job, and with it this very command: only a look at the job tells for certain.
        """
        return self._change("requeue", str(job))

    def exclude(self, job: int, nodes: Sequence[str]) -> str | None:
        """Have the job run on none of these nodes; None when SLURM took that, else what it said."""
        return self._change("update", f"JobId={job}", f"ExcNodeList={','.join(nodes)}")

    def _change(self, *words: str) -> str | None:
        code, output = self._call(*words)
        return None if code == 0 else (output.strip().replace("\n", " ") or f"scontrol ended with {code}")

    def _call(self, *words: str) -> tuple[int, str]:
        try:
            result = subprocess.run(
                [self.scontrol, *words],
                env={**os.environ, **TIME_FORMAT},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=PATIENCE,
                check=False,
                text=True,
                errors="replace",
            )
        except subprocess.TimeoutExpired:
            return -1, f"no answer within {PATIENCE:g} s"
        except OSError as error:
            return -1, error.strerror or str(error)
        return result.returncode, result.stdout


def address_of(node: str) -> str:
    """Where a node is reached: by its name, or, where that is SLURM's alone, by what SLURM itself reaches it by."""
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError:
        client = Client.found()
        text = client.show("node", node) if client is not None else None
        return fields(text).get("NodeAddr", node) if text else node
