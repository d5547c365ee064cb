"""Real sockets: who is heard, what is answered, what is refused."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path

import pytest

from supervisor.edge import link
from supervisor.edge.channel import Channel, Message, Peer
from supervisor.edge.control import ControlPage, Word
from supervisor.errors import ProtocolError


async def echo(peer: Peer, message: Message) -> Message | None:
    if message["kind"] == "slow":
        await asyncio.sleep(float(message["seconds"]))
    if message["kind"] == "bad":
        raise ValueError("no such thing")
    if message["kind"] == "disk":
        raise OSError(28, "No space left on device")
    return {"pid": peer.pid, **message} if message["kind"] != "quiet" else None


async def talk(path: Path, *lines: bytes) -> list[dict[str, object]]:
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.writelines(lines)
    writer.write_eof()
    answers = [json.loads(line) for line in (await reader.read()).splitlines()]
    writer.close()
    return answers


def test_answers_refusals_and_garbage(tmp_path: Path) -> None:
    async def scenario() -> None:
        reports: list[str] = []
        channel = Channel(tmp_path / "socket", echo, reports.append)
        await channel.open()
        answers = await talk(
            channel.path, b'{"kind": "x", "ask": true}\n', b'{"kind": "quiet"}\n', b"garbage\n", b"[1]\n",
            b'{"kind": "bad"}\n', b'{"kind": "bad", "ask": true}\n', b'{"kind": "slow", "ask": true}\n',
            b'{"kind": "disk", "ask": true}\n', b'{"kind": "quiet", "ask": true}\n', b'{"kind": "y", "ask": true}\n',
        )  # fmt: skip
        assert answers[0] == {"kind": "x", "ask": True, "pid": os.getpid()}
        assert [sorted(answer) for answer in answers[1:4]] == [["refused"]] * 3
        assert "No space left" in str(answers[3]["refused"])
        assert answers[4] == {}
        assert answers[5]["kind"] == "y"
        assert len(reports) == 3  # garbage, no message, and one that is told and makes no sense
        await channel.close()
        assert not channel.path.exists()

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_slow_answer_holds_up_nobody_else(tmp_path: Path) -> None:
    async def scenario() -> None:
        channel = Channel(tmp_path / "socket", echo)
        await channel.open()
        slow = asyncio.create_task(talk(channel.path, b'{"kind": "slow", "seconds": 600, "ask": true}\n'))
        assert await talk(channel.path, b'{"kind": "x", "ask": true}\n')
        assert not slow.done()
        slow.cancel()
        await channel.close()

    asyncio.run(asyncio.wait_for(scenario(), 20))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_another_user_is_not_heard() -> None:
    async def scenario(folder: Path) -> str:
        folder.chmod(0o755)
        channel = Channel(folder / "socket", echo)
        await channel.open()
        channel.path.chmod(0o666)  # as if the file's own protection had failed
        code = (
            "import os, socket, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX); "
            "s.connect(sys.argv[1]); s.settimeout(10)\n"
            'try:\n s.sendall(b\'{"kind": "x", "ask": true}\\n\'); print("heard" if s.recv(100) else "dropped")\n'
            'except ConnectionError:\n print("dropped")'
        )
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, str(channel.path), stdout=asyncio.subprocess.PIPE
        )
        out, _ = await child.communicate()
        await channel.close()
        return out.decode().strip()

    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # a place that another user can reach
        assert asyncio.run(asyncio.wait_for(scenario(Path(folder)), 30)) == "dropped"


def test_a_link_greets_asks_and_survives_the_supervisors_death(tmp_path: Path) -> None:
    link.control_folder(tmp_path, 7).mkdir(parents=True)

    async def scenario() -> None:
        heard: list[Message] = []

        async def handler(peer: Peer, message: Message) -> Message | None:
            heard.append(message)
            return {"save_every_steps": [5]} if message["kind"] == "hello" else None

        channel = Channel(link.socket_path(tmp_path), handler)
        await channel.open()
        worker = await asyncio.to_thread(link.Link, tmp_path, rank=3, local_rank=1, world_size=4, attempt=7)
        assert worker.welcome == {"save_every_steps": [5]}
        assert heard[0]["rank"] == 3
        worker.page[Word.STEP] = 12
        page = ControlPage(link.page_path(tmp_path, 7, 1))
        assert page[Word.STEP] == 12
        page[Word.PROPOSAL] = 5
        assert worker.page[Word.PROPOSAL] == 5
        page.close()
        await channel.close()
        await asyncio.to_thread(worker.tell, "saved", step=1)  # no error: it is about to be killed
        with pytest.raises(ProtocolError):
            await asyncio.to_thread(lambda: worker.ask("resume", deadline=5))
        worker.close()

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_no_link_without_a_supervisor_or_in_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    assert link.current({}) is None
    assert link.current({link.WORKER_PID: "1", link.RUNTIME: "/nowhere", link.ATTEMPT: "0"}) is None
    with pytest.raises(OSError, match=r"No such file|refused"):
        link.current({link.WORKER_PID: str(os.getpid()), link.RUNTIME: "/nowhere", link.ATTEMPT: "0"})


def test_a_page_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page").write_bytes(b"\0" * 4096)
    with pytest.raises(ValueError, match="no control page"):
        ControlPage(tmp_path / "page")
