"""``everstep submit slurm``: the script it writes, to the letter, and what it refuses before anything is submitted."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from launch import cli, submit
from launch.slurm import options
from supervisor.errors import UsageError

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    return tmp_path


def built(text: str) -> str:
    return submit.built(text.split(), cli._read_run, ["everstep"])


def test_the_template_is_what_is_submitted() -> None:
    words = "--time=24:00:00 --exclusive --gpus-per-node=8 -- torchrun --nproc-per-node=auto train.py"
    assert built(words) == (ROOT / "deploy" / "slurm" / "everstep.sbatch").read_text()


def test_several_nodes_to_the_letter() -> None:
    words = "--nodes=2-4 --no-kill --time=60 -- --nnodes 2:4 torchrun --nproc-per-node=8 train.py"
    assert built(words) == (GOLDEN / "nodes.sbatch").read_text()


def test_a_chain_to_the_letter() -> None:
    words = "--chain -t 60 -J mine -c 16 -k -x n[1-2] -- --grace 30s torchrun train.py --lr 3e-4"
    assert built(words) == (GOLDEN / "chain.sbatch").read_text()


@pytest.mark.parametrize(
    ("words", "there", "absent"),
    [
        ("-- --requeue off torchrun train.py", ['exit "$code"'], ["scontrol"]),
        ("-- --name big torchrun train.py", ["--job-name=big\n"], []),
        ("--job-name=x -- --name big torchrun train.py", ["--job-name=x\n"], ["--job-name=big"]),
        (
            "--chain -- --dir /jobs/a torchrun train.py",
            ["run \\\n    --dir /jobs/a torchrun"],
            ["everstep-runs"],
        ),
        ("-N1 -pgpu --array=0-3 -- torchrun train.py", ["--partition=gpu\n", "--array=0-3\n"], []),
        ("-N 2 -- torchrun train.py", ["--nodes=2\n", "srun --ntasks-per-node=1"], ["everstep status"]),
        (
            "-N 2-4 --no-kill -- --requeue off --nnodes 1:4 torchrun train.py",
            ["--nodes=2-4\n", "--no-kill everstep", '--dir everstep-runs/train-"$SLURM_JOB_ID")'],
            ["scontrol"],
        ),
        (
            "-a 1-2 -k -- torchrun train.py",
            ['everstep-runs/train-"${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}")'],
            [],
        ),
        ("-k -- --dir /jobs/a torchrun train.py", ["status --json --dir /jobs/a)"], []),
    ],
)
def test_what_the_words_change(words: str, there: list[str], absent: list[str]) -> None:
    script = built(words)
    assert all(text in script for text in there), script
    assert not any(text in script for text in absent), script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_values_with_blanks_and_quotes_stay_one_value() -> None:
    words = ["--comment", 'a "b" #c', "--", "torchrun", "train.py", "--name", "it's", "$HOME"]
    script = submit.built(words, cli._read_run, ["/my envs/bin/everstep"])
    assert '#SBATCH --comment="a \\"b\\" #c"\n' in script
    assert "'/my envs/bin/everstep' run" in script
    assert """--name 'it'"'"'s' '$HOME' &""" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("", 64, "to whom?"),
        ("pbs", 64, "'pbs' is unknown"),
        ("slurm", 64, "-- is missing"),
        ("slurm torchrun train.py", 64, "-- is missing"),
        ("slurm --", 64, "no program given"),
        ("slurm --time -- torchrun train.py", 64, "--time: a value is required"),
        ("slurm --time= -- torchrun train.py", 64, "--time=: a value of one line"),
        ("slurm --nodse=1 -- torchrun train.py", 64, "did you mean --nodes?"),
        ("slurm low -- torchrun train.py", 64, "'low' is no option of sbatch"),
        ("slurm -Hx -- torchrun train.py", 64, "'-Hx' is no option of sbatch"),
        ("slurm -n8 -- torchrun train.py", 64, "one task on each node"),
        ("slurm --requeue -- torchrun train.py", 64, "--chain where that is forbidden"),
        ("slurm --wrap x -- torchrun train.py", 64, "put the command behind --"),
        ("slurm -N 2 -- python train.py", 64, "several nodes are torchrun's to start"),
        ("slurm -N 2-3 -- --nnodes 4:8 torchrun train.py", 64, "fewer than the training's --nnodes 4:8"),
        ("slurm -- torchrun --nnodes 2 train.py", 64, "--nodes=1: fewer than the training's --nnodes 2"),
        ("slurm -- torchrun nope.py", 64, "script nope.py does not exist"),
        ("slurm -- --grcae 1s torchrun train.py", 64, "did you mean --grace?"),
        ("slurm -- --grace x torchrun train.py", 78, "--grace"),
        ("slurm -a 0-3 -- --dir x torchrun train.py", 64, "need a directory each"),
        ("slurm -a 0-3 --chain -- torchrun train.py", 64, "--chain does not go with --array"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], words: str, code: int, said: str) -> None:
    assert cli.call(["submit", *words.split()]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert said in captured.err


def test_every_option_of_sbatch_is_understood_in_each_spelling() -> None:
    for name, letter in options.VALUED.items():
        assert options.parse([f"--{name}=1"]) == options.parse([f"--{name}", "1"]) == {name: "1"}
        if letter:
            assert options.parse([f"-{letter}1"]) == options.parse([f"-{letter}", "1"]) == {name: "1"}
    for name, letter in options.SWITCHES.items():
        assert options.parse([f"--{name}"]) == {name: None}
        if letter:
            assert options.parse([f"-{letter}"]) == {name: None}
    for name in options.OWNED:
        with pytest.raises(UsageError):
            options.parse([f"--{name}", "1"])


def test_help_is_given_wherever_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.call(["submit", "slurm", "--help"]) == 0
    assert "--chain" in capsys.readouterr().out


def test_the_script_is_printed_or_given_to_sbatch(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["submit", "slurm", "--time=5", "--", "torchrun", "train.py"]
    assert cli.call([*words[:2], "--print", *words[2:]]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#!/bin/bash\n")
    sbatch = folder / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text('#!/bin/sh\ncat > submitted\necho "$@" > how\necho "4711;cluster"\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    assert cli.call(words) == 0
    assert capsys.readouterr().out == "4711\n"
    assert (folder / "submitted").read_text() == script
    assert (folder / "how").read_text() == "--parsable\n"
    sbatch.write_text('#!/bin/sh\necho "sbatch: error: invalid partition" >&2\nexit 1\n')
    assert cli.call(words) == 1
    assert capsys.readouterr().err == "everstep: sbatch: error: invalid partition\n"
