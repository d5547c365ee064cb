"""The user's command, table by table: what is understood, what is handed on, what is refused and with which words."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch import agent, torchrun
from launch.program import AGENT, WORKER, parse
from launch.torchrun import Form
from supervisor.errors import UsageError
from supervisor.program import Rendezvous

PYTHON = sys.executable
TORCHRUN = str(Path(sys.executable).with_name("torchrun"))
#: what pip wrote into torchrun: python or python3 of the same environment
TORCHRUNS = Path(TORCHRUN).read_text().partition("\n")[0].removeprefix("#!")
ON_PATH = shutil.which("python3")
OWN = [
    "--nnodes=1",
    "--node-rank=0",
    "--rdzv-backend=static",
    "--master-addr=127.0.0.1",
    "--master-port=29555",
]


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__main__.py").touch()
    (tmp_path / "empty").mkdir()
    for name in ("train.py", "run.sh", "torchrun"):
        (tmp_path / name).touch()
    (tmp_path / "run.sh").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(PYTHON).parent}:/usr/bin:/bin")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "form", "target", "arguments", "options"),
    [
        ("train.py", Form.SCRIPT, "train.py", "", ""),
        (
            "train.py --x -- -m --nproc-per-node 3",
            Form.SCRIPT,
            "train.py",
            "--x -- -m --nproc-per-node 3",
            "",
        ),
        ("--nproc-per-node=2 train.py", Form.SCRIPT, "train.py", "", "--nproc-per-node=2"),
        ("--nproc_per_node 2 train.py a", Form.SCRIPT, "train.py", "a", "--nproc-per-node=2"),
        ("--nproc_per auto train.py", Form.SCRIPT, "train.py", "", "--nproc-per-node=auto"),
        ("--nproc-per-node nonsense train.py", Form.SCRIPT, "train.py", "", "--nproc-per-node=nonsense"),
        ("--standalone --nnodes 1:1 train.py", Form.SCRIPT, "train.py", "", ""),
        ("-m pkg.train -m", Form.MODULE, "pkg.train", "-m", ""),
        ("--module pkg", Form.MODULE, "pkg", "", ""),
        ("--no-python ./run.sh a", Form.COMMAND, "./run.sh", "a", ""),
        ("--no_python bash -c true", Form.COMMAND, "bash", "-c true", ""),
        ("--run-path --no-python train.py", Form.RUN_PATH, "train.py", "", ""),
        ("-r 3 -t1 --log_dir l train.py", Form.SCRIPT, "train.py", "", "--log-dir=l --redirects=3 --tee=1"),
        (
            "-t3 --log_line_prefix_template ${hostname}:${rank}: train.py",
            Form.SCRIPT,
            "train.py",
            "",
            "--tee=3 --log-line-prefix-template=${hostname}:${rank}:",
        ),
        ("--virtual-local-rank pkg", Form.SCRIPT, "pkg", "", "--virtual-local-rank"),
        (
            "--role r --start_method fork train.py",
            Form.SCRIPT,
            "train.py",
            "",
            "--start-method=fork --role=r",
        ),
        ("--brand-new=3 train.py --z", Form.SCRIPT, "train.py", "--z", "--brand-new=3"),
    ],
)
def test_torchrun(words: str, form: Form, target: str, arguments: str, options: str) -> None:
    program = parse(["torchrun", *words.split()], {})
    assert (program.form, program.target) == (form, target)
    assert program.arguments == tuple(arguments.split())
    assert program.interpreter == TORCHRUNS
    folder = [str(Path(TORCHRUN).parent)] if form is Form.RUN_PATH else []
    assert program.attempt_argv(Rendezvous(port=29555)) == [
        TORCHRUNS, AGENT, str(os.getpid()), TORCHRUN, *OWN, "--max-restarts=0", *options.split(),
        WORKER, form.value, *folder, target, *arguments.split(),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "flags", "form", "target", "arguments"),
    [
        ("train.py a -u", "", Form.SCRIPT, "train.py", "a -u"),
        ("-u train.py", "-u", Form.SCRIPT, "train.py", ""),
        ("-BO -X dev -Wignore train.py", "-BO -X dev -Wignore", Form.SCRIPT, "train.py", ""),
        ("-X dev -m pkg.train -x", "-X dev", Form.MODULE, "pkg.train", "-x"),
        ("-Bmpkg -x", "-B", Form.MODULE, "pkg", "-x"),
        ("-um pkg", "-u", Form.MODULE, "pkg", ""),
        ("-- train.py", "", Form.SCRIPT, "train.py", ""),
        ("--check-hash-based-pycs never pkg", "--check-hash-based-pycs never", Form.SCRIPT, "pkg", ""),
    ],
)
def test_python(words: str, flags: str, form: Form, target: str, arguments: str) -> None:
    program = parse(["python3", *words.split()], {})
    assert (program.form, program.target, program.launcher) == (form, target, None)
    assert (program.flags, program.arguments) == (tuple(flags.split()), tuple(arguments.split()))
    unbuffered = [] if "-u" in flags else ["-u"]
    assert program.attempt_argv(Rendezvous(port=1))[1:] == [
        *unbuffered, *flags.split(), WORKER, form.value, target, *arguments.split(),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "path"),
    [
        ([TORCHRUN], TORCHRUN),
        (["python3", "-u", "-m", "torch.distributed.run"], ""),
        (["python3", TORCHRUN], TORCHRUN),
    ],
    ids=["path", "module", "python torchrun"],
)
def test_other_ways_to_torchrun(command: list[str], path: str) -> None:
    program = parse([*command, "--nproc-per-node=2", "train.py"], {})
    assert program.has_ranks
    argv = program.attempt_argv(Rendezvous(port=29555))
    assert argv[argv.index(AGENT) + 2] == path
    assert argv[-4:] == ["--nproc-per-node=2", WORKER, "script", "train.py"]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("", "no program given; allowed: everstep run [options] torchrun"),
        ("bash run.sh", "cannot run 'bash'; allowed: torchrun"),
        ("train.py", "train.py is a script, not a program: write `python train.py`"),
        ("python3", "no script given"),
        ("python3 -u", "no script given"),
        ("python3 -c pass", "code on the command line"),
        ("python3 -m", "-m needs a module"),
        ("python3 -X", "-X needs a value"),
        ("python3 -m 3x", "not a module's name"),
        ("python3 -", "standard input"),
        ("python3 -i train.py", "option -i is not supported"),
        ("python3 --version", "option --version is not supported"),
        ("python3 none.py", "script none.py does not exist (in "),
        ("python3 empty", "empty is a directory without __main__.py"),
        ("python9.9 train.py", "python9.9 is not on PATH"),
        ("./bin/python train.py", "./bin/python does not exist"),
        ("python3 -m torch.distributed.launch train.py", "use torchrun"),
        ("torchrun", "torchrun: no script given"),
        ("torchrun --nproc-per-node=2", "torchrun: no script given"),
        ("torchrun --help", "`torchrun --help`"),
        ("torchrun --nproc-per-node=2 -h", "`torchrun --help`"),
        ("torchrun --print-completion zsh", "`torchrun --print-completion` runs nothing"),
        ("torchrun none.py", "script none.py does not exist"),
        ("torchrun -m", "no script given"),
        ("torchrun -m a-b", "not a module's name"),
        ("torchrun --no-python none.sh", "none.sh is not on PATH"),
        ("torchrun --no-python ./train.py", "./train.py does not exist or is not executable"),
        ("torchrun --no-python -m x", "exclude each other"),
        ("torchrun --brand-new train.py", "unknown option --brand-new"),
        ("torchrun --start-method x train.py", "invalid choice"),
        ("./torchrun train.py", "its interpreter is not known"),
    ],
)
def test_refused(command: str, said: str) -> None:
    Path("torchrun").chmod(0o755)
    with pytest.raises(UsageError) as caught:
        parse(command.split(), {})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "environ", "said"),
    [
        ("train.py", {}, []),
        ("--nnodes=1 train.py", {}, []),
        ("--standalone train.py", {}, ["--standalone is taken over"]),
        (
            "--rdzv-backend c10d --rdzv_endpoint=h:1 train.py",
            {},
            ["--rdzv-backend, --rdzv-endpoint are taken over"],
        ),
        ("--max-restarts=3 train.py", {}, ["--max-failures"]),
        (
            "--master-port 1 --signals_to_handle X train.py",
            {},
            ["--master-port is", "--signals-to-handle is"],
        ),
        ("train.py", {"PET_STANDALONE": "1", "PET_MAX_RESTARTS": "2"}, ["--standalone is", "--max-failures"]),
        ("train.py", {"PET_STANDALONE": "0"}, []),
    ],
)
def test_what_is_taken_over_is_said(words: str, environ: dict[str, str], said: list[str]) -> None:
    notices = parse(["torchrun", *words.split()], environ).notices
    assert len(notices) == len(said)
    assert all(text in notice for text, notice in zip(said, notices, strict=True))


def test_variables_that_decide_the_form() -> None:
    assert parse(["torchrun", "pkg"], {"PET_MODULE": "1"}).form is Form.MODULE
    assert parse(["torchrun", "bash"], {"PET_NO_PYTHON": "1"}).form is Form.COMMAND
    with pytest.raises(UsageError, match="PET_MODULE=yes: 0 or 1"):
        parse(["torchrun", "pkg"], {"PET_MODULE": "yes"})


def test_the_agent_hides_what_everstep_owns() -> None:
    owned = {f"PET_{option.key.upper()}" for option in torchrun._OWNED + torchrun._FORMS}
    assert set(agent._hidden_variables()) == owned


@pytest.mark.parametrize(
    ("words", "environ", "redirect"),
    [
        ("train.py", {}, "1"),
        ("--log-dir x train.py", {}, "1"),
        ("-r 0 train.py", {}, "1"),
        ("-r 3 train.py", {}, "0"),
        ("--tee 1:2 train.py", {}, "0"),
        ("--logs-specs mine train.py", {}, "0"),
        ("train.py", {"PET_TEE": "3"}, "0"),
    ],
)
def test_who_redirects(words: str, environ: dict[str, str], redirect: str) -> None:
    assert parse(["torchrun", *words.split()], environ).environment["EVERSTEP_REDIRECT"] == redirect


@pytest.mark.parametrize(
    ("command", "name", "identity"),
    [
        ("python3 train.py", "train", "{cwd}/train.py"),
        ("python3 ./pkg/../train.py", "train", "{cwd}/train.py"),
        ("python3 {cwd}/train.py", "train", "{cwd}/train.py"),
        ("python3 link.py", "link", "{cwd}/train.py"),
        ("python3 /usr/../etc/hostname", "hostname", "/etc/hostname"),
        ("python3 pkg", "pkg", "{cwd}/pkg"),
        ("torchrun -m pkg.train", "train", "-m pkg.train"),
        ("torchrun --no-python bash x", "bash", "bash"),
        ("torchrun --no-python ./run.sh", "run", "{cwd}/run.sh"),
    ],
)
def test_name_and_identity(command: str, name: str, identity: str) -> None:
    Path("link.py").symlink_to("train.py")
    program = parse(command.format(cwd=os.getcwd()).split(), {})
    assert (program.name, program.identity) == (name, identity.format(cwd=os.path.realpath(".")))


def test_the_identity_does_not_hang_on_the_current_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("pkg/train.py").touch()
    here = parse(["python3", "train.py"], {}).identity
    monkeypatch.chdir("pkg")
    assert parse(["python3", "../train.py"], {}).identity == here
    assert parse(["python3", "train.py"], {}).identity != here


@pytest.mark.parametrize("file", [AGENT, f"{WORKER}/__main__.py"])
def test_an_interpreter_that_is_too_old_is_told_so(file: str) -> None:
    pretend = (
        "import runpy, sys\n"
        "sys.version_info = (3, 10, 4, 'final', 0)\n"
        f"sys.argv[0] = {file!r}\n"
        f"runpy.run_path({file!r}, run_name='__main__')\n"
    )
    result = subprocess.run([PYTHON, "-c", pretend], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2  # as for wrong arguments: not to be tried again
    assert result.stderr == f"everstep: Python 3.11 or newer is required, {PYTHON} is 3.10\n"


@pytest.mark.parametrize(
    ("head", "interpreter"),
    [
        (f"#!{PYTHON}\nimport x\n", [PYTHON]),
        (f"#!{PYTHON} -sP\n", [PYTHON, "-sP"]),
        ("#!/usr/bin/env python3\n", [ON_PATH]),
        ("#!/usr/bin/env -S python3 -u\n", [ON_PATH, "-u"]),
        (f"#!/bin/sh\n'''exec' {PYTHON} \"$0\" \"$@\"\n' '''\n", [PYTHON]),
        (f"#!/bin/sh\n'''exec' \"{PYTHON}\" \"$0\" \"$@\"\n' '''\n", [PYTHON]),
        ("#!/bin/bash\nexec torchrun\n", None),
        ("#!/no/python3\n", None),
        ("\x7fELF", None),
        ("", None),
        ("#!\n", None),
        ("#!/bin/sh\n'''exec' \"unclosed\n", None),
    ],
)
def test_the_interpreter_of_a_console_script(
    tmp_path: Path, head: str, interpreter: list[str] | None
) -> None:
    script = tmp_path / "script"
    script.write_text(head)
    if interpreter is None:
        with pytest.raises(UsageError):
            torchrun.interpreter_of(script)
    else:
        assert torchrun.interpreter_of(script) == interpreter


def test_the_mirror_knows_all_of_torchruns_options() -> None:
    """torch is imported by another process: the options of the installed torchrun are all in our tables."""
    program = (
        "from torch.distributed.run import get_args_parser\n"
        "for action in get_args_parser()._actions:\n"
        "    if action.option_strings: print(action.dest, action.nargs == 0, *action.option_strings)\n"
    )
    result = subprocess.run([PYTHON, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    theirs = {tuple(line.split()) for line in result.stdout.splitlines() if not line.startswith("help")}
    ours = {
        (action.dest, str(action.nargs == 0), *action.option_strings)
        for action in torchrun._parser()._actions
        if action.option_strings and action.dest != "help"
    }
    assert theirs <= ours
