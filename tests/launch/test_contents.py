"""``everstep checkpoints inspect | compare | export``, and the plot of a metric: the words, the tables, the JSON."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch
from torch.distributed import checkpoint as dcp

from launch import cli, plot
from supervisor.checkpoint.catalog import step_directory
from supervisor.checkpoint.commit import drain
from supervisor.edge.jobdir import JobDirectory
from tests.checkpoint.tools import flip_bit, origin

LOSSES = {100: 2.5, 200: 1.5, 300: 2.0}


def state(step: int) -> dict[str, Any]:
    return {
        "model": {"layers.9.weight": torch.full((2, 3), step / 100), "layers.10.weight": torch.ones(4), "frozen": torch.ones(700_000)},
        "optimizer": {"state": {"layers.9.weight": {"exp_avg": torch.full((2, 3), step * 9.0)}}, "lr": 1 / step},
    }  # fmt: skip


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Checkpoints of steps 100, 200 and 300, and torch's own of step 300 beside the job."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EVERSTEP_KEY", raising=False)
    directory = JobDirectory(tmp_path / "everstep-runs" / "train")
    with directory.claim():
        directory.open_epoch("train.py", ["python", "train.py"])
    for step, loss in LOSSES.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(state(step), checkpoint_id=tmp_path / "stock", no_dist=True)
        drain(
            tmp_path / "stock",
            step_directory(directory.path / "checkpoints", step),
            origin(step, metrics={"loss": loss, "accuracy": step / 1000}),
        )
    return directory.path


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = cli.call(["checkpoints", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def answer(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    code, out, err = call(capsys, *words, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


@pytest.mark.parametrize(
    ("word", "step"),
    [("200", 200), ("latest", 300), ("best", 200), ("everstep-runs/train/checkpoints/step-000000100", 100), ("stock", None), ("./stock", None)],
)  # fmt: skip
def test_a_checkpoint_is_meant_by(
    capsys: pytest.CaptureFixture[str], job: Path, word: str, step: int | None
) -> None:
    found = answer(capsys, "inspect", word)
    assert found["step"] == step
    assert found["verified"] == {"stock": None, "latest": "everything"}.get(word.removeprefix("./"), "index")


def test_latest_is_the_newest_good_one(capsys: pytest.CaptureFixture[str], job: Path) -> None:
    flip_bit(step_directory(job / "checkpoints", 300) / "__0_0.distcp", 2_000_000)
    assert answer(capsys, "inspect", "latest")["step"] == 200
    code, out, err = call(capsys, "export", 300, "-o", "x.pt")
    assert (code, out) == (1, "")
    assert "is damaged: __0_0.distcp: digest does not match" in err


def test_best_goes_by_what_is_said(capsys: pytest.CaptureFixture[str], job: Path) -> None:
    assert answer(capsys, "inspect", "best", "--best", "accuracy:max")["step"] == 300
    assert [
        record["step"] for record in answer(capsys, "list", "--best", "accuracy:max") if record["best"]
    ] == [300]
    Path("everstep.yaml").write_text("keep_best: accuracy:min:1\n")
    assert answer(capsys, "inspect", "best")["step"] == 100


def test_inspect(capsys: pytest.CaptureFixture[str], job: Path) -> None:
    items = {item["key"]: item for item in answer(capsys, "inspect", 200)["items"]}
    assert list(items) == [
        "model.frozen", "model.layers.9.weight", "model.layers.10.weight", "optimizer.lr", "optimizer.state.layers.9.weight.exp_avg",
    ]  # fmt: skip
    assert items["model.layers.9.weight"] | {"bytes_stored": 0} == {
        "key": "model.layers.9.weight", "rank": 0, "shape": [2, 3], "dtype": "float32", "bytes": 24, "bytes_stored": 0,
        "parts": 1, "files": ["__0_0.distcp"],
    }  # fmt: skip
    assert items["optimizer.lr"]["shape"] is None
    code, out, _ = call(capsys, "inspect", 200, "--only", "model.layers")
    assert code == 0
    assert "2×3" in out
    assert "frozen" not in out
    assert "verified: the index only" in out
    assert "nothing was verified" in call(capsys, "inspect", "stock")[1]


def test_compare(capsys: pytest.CaptureFixture[str], job: Path) -> None:
    found = answer(capsys, "compare", 100, "latest")
    assert found["metrics"]["loss"] == {"a": 2.5, "b": 2.0}
    assert found["summary"] == {"same": 2, "changed": 3}
    items = {item["key"]: item for item in found["items"]}
    assert items["model.layers.9.weight"]["relative"] == 2.0
    assert items["optimizer.lr"]["value_a"] == "0.01"
    code, out, _ = call(capsys, "compare", 100, 300)
    lines = out.splitlines()
    assert code == 0
    weight, moment = (
        next(n for n, line in enumerate(lines) if line.startswith(key))
        for key in ("model.layers.9", "optimizer.state")
    )
    assert weight < moment
    assert not any("frozen" in line for line in lines)
    assert any("frozen" in line for line in call(capsys, "compare", 100, 300, "--all")[1].splitlines())
    assert "2 same, 1 changed" in lines[-2]
    only = call(capsys, "compare", 100, "stock", "--weights-only")[1]
    assert "optimizer" not in only
    assert "nothing was verified" in only


@pytest.mark.parametrize("words", [("--json",), ()])
def test_export(capsys: pytest.CaptureFixture[str], job: Path, words: tuple[str, ...]) -> None:
    code, out, err = call(capsys, "export", "best", "--weights-only", "-o", "w.pt", *words)
    assert (code, err) == (0, "")
    if words:
        assert json.loads(out)["tensors"] == 3
    else:
        assert out == "3 weights, 2.8 MB, of step 200 are in w.pt\n"
    assert torch.load("w.pt")["layers.9.weight"].tolist() == [[2.0] * 3] * 2
    code, out, _ = call(capsys, "export", 100, "-o", "all.safetensors")
    assert code == 0
    assert "left out, for they are no tensors: optimizer.lr" in out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("inspect", 64, "arguments are required: CHECKPOINT"),
        ("inspect none", 64, "'none' is no checkpoint: a step, latest, best or the path"),
        ("inspect 150", 64, "no checkpoint of step 150 in "),
        ("inspect ./none", 1, "no such directory"),
        ("inspect everstep-runs/train", 64, "is a job, not a checkpoint: say STEP --dir"),
        ("inspect everstep-runs", 1, "is no checkpoint: it has no .metadata"),
        ("inspect 100 --only none", 64, "there are: model, optimizer"),
        ("inspect best --best loss", 64, "METRIC:min or METRIC:max is required"),
        ("inspect best --best f1:max", 64, "has a metric 'f1' to be best by"),
        ("inspect latest --dir none", 78, "no job in "),
        ("compare 100", 64, "arguments are required: B"),
        ("compare 100 200 -o x.svg", 64, "say which metric"),
        ("compare 100 200 --plot loss -o x.png", 64, "ending in .svg or .html"),
        ("compare 100 200 --plot f1", 64, "no checkpoint has a metric 'f1'; there are: accuracy, loss"),
        ("export 100", 64, "arguments are required: -o/--output"),
        ("export 100 -o x.bin", 64, "the ending says the format"),
        ("export 100 -o none/x.pt", 64, "there is no directory"),
        ("export 100 -o stock", 64, "is a directory that is not empty"),
        ("export 100 -o x.pt --max-shard-size 1GB", 64, "is for a directory of shards"),
        ("export 100 -o x --max-shard-size much", 64, "'much' is not a size"),
        ("export 100 -o x.safetensors --only optimizer.lr", 64, "there are no tensors to export"),
        ("export 100 -o x.pt --weights-only --only optimizer", 64, "holds no weights"),
    ],
)
def test_wrong_words(capsys: pytest.CaptureFixture[str], job: Path, words: str, code: int, said: str) -> None:
    before = sorted(path.name for path in Path().iterdir())
    found, out, err = call(capsys, *words.split())
    assert (found, out) == (code, "")
    assert err.startswith("everstep: ")
    assert err.count("\n") == 1
    assert said in err
    assert sorted(path.name for path in Path().iterdir()) == before


def test_a_stock_checkpoint_needs_no_job(
    capsys: pytest.CaptureFixture[str], job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("stock")
    assert call(capsys, "inspect", ".")[0] == 0
    code, out, _ = call(capsys, "export", ".", "--only", "model", "-o", "../m.safetensors")
    assert (code, out.splitlines()[1]) == (0, "no everstep.json, so nothing was verified")


# --------------------------------------------------------------------------- sizes, plot


def test_the_list_says_what_is_on_disk(capsys: pytest.CaptureFixture[str], job: Path) -> None:
    source = step_directory(job / "checkpoints", 300)
    drain(source, step_directory(job / "checkpoints", 400), origin(400))  # all of it unchanged
    newest, *older = answer(capsys, "list")
    assert newest["bytes_on_disk"] < 1_000_000 < newest["bytes"]
    assert all(record["bytes_on_disk"] > record["bytes"] for record in older)
    flip_bit(source / "__0_0.distcp", 2_000_000)
    code, out, _ = call(capsys, "verify")
    assert code == 1
    assert out.count("__0_0.distcp: digest does not match (shared by 2 checkpoints)") == 2


@pytest.mark.parametrize("name", ["loss.svg", "loss.html"])
def test_a_plot_is_drawn(capsys: pytest.CaptureFixture[str], job: Path, name: str) -> None:
    code, out, _ = call(capsys, "compare", 100, 300, "--plot", "loss", "-o", name)
    assert code == 0
    assert "loss  █▁▅  2.5 at step 100 to 2 at 300; 1.5 to 2.5" in out
    text = Path(name).read_text()
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    picture = ET.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    dots = picture.findall("{http://www.w3.org/2000/svg}circle")
    assert [dot.get("class") for dot in dots] == ["mark", "point", "best", "mark", "point"]
    assert [dot[0].text for dot in dots if len(dot)] == [
        "step 100: 2.5",
        "step 200: 1.5, the best",
        "step 300: 2",
    ]


def test_a_plot_of_anything() -> None:
    for points in ([], [(1, 0.0)], [(1, 5.0), (2, 5.0)], [(n, (-1.0) ** n * n) for n in range(1000)]):
        ET.fromstring(plot.svg("a<b", points, best=1))
        assert len(plot.line("a", points)) < 150


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (1.51, 2.5, [1.4, 1.6, 1.8, 2.0, 2.2, 2.4, 2.6]), (-3, 3, [-4, -2, 0, 2, 4]), (7, 7, [3, 4, 5, 6, 7, 8, 9, 10, 11])],
)  # fmt: skip
def test_ticks_are_round_and_enclose(low: float, high: float, expected: list[float]) -> None:
    found = plot.ticks(low, high, 5)
    assert found[0] <= low <= high <= found[-1]
    assert len(found) <= 9
    assert found == pytest.approx(expected) or low == high
