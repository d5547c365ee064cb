"""The shape of the code, as far as import-linter cannot see it: names, packages, what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: the modules of the PyPI package ``supervisor`` 4.3.0 (supervisord), which has our import name
SUPERVISORD = frozenset(
    """childutils compat confecho datatypes dispatchers events http http_client loggers medusa options pidproxy poller
    process rpcinterface scripts skel socket_manager states supervisorctl supervisord templating tests ui version web
    xmlrpc""".split()
)


def modules(package: str) -> list[str]:
    """Dotted names of the package's modules, itself included."""
    files = sorted((ROOT / package).rglob("*.py"))
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return [name.removesuffix(".__init__") for name in names]


def test_no_module_bears_the_name_of_one_of_supervisords() -> None:
    ours = {path.stem for path in (ROOT / "supervisor").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert len(ours) > 5
    assert not ours & SUPERVISORD


@pytest.mark.parametrize("package", ["supervisor", "launch"])
def test_the_packages_hold_only_a_docstring(package: str) -> None:
    body = ast.parse((ROOT / package / "__init__.py").read_text()).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)
    assert isinstance(body[0].value, ast.Constant)
    assert isinstance(body[0].value.value, str)


@pytest.mark.parametrize("name", ["failing", "model", "errors"])
def test_the_vocabulary_imports_only_the_standard_library(name: str) -> None:
    imported = set()
    for node in ast.walk(ast.parse((ROOT / "supervisor" / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    if name == "model":  # which hands on the part of it that is about failing
        imported.discard("supervisor")
    assert imported <= sys.stdlib_module_names


def test_everything_but_training_imports_without_torch() -> None:
    names = [name for name in modules("supervisor") + modules("launch") if ".training" not in name]
    assert len(names) > 10
    program = (
        "import importlib, sys\n"
        "sys.modules['torch'] = None  # an import of torch raises\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=60)


def test_no_file_grows_long() -> None:
    """A long file usually holds a decision and an effect together: part them."""
    long = {name: count for name in modules("supervisor") + modules("launch") if (count := lines(name)) > 400}
    assert not long


def lines(module: str) -> int:
    """Length of a module's source."""
    path = ROOT / Path(*module.split("."))
    file = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
    return len(file.read_text().splitlines())


def test_object_stores_are_not_imported_without_a_url() -> None:
    program = (
        "import sys, pathlib\n"
        "from supervisor import node, stores\n"
        "from supervisor.checkpoint.storage import open_storage\n"
        "open_storage(pathlib.Path('x'), None)\n"
        "assert 'obstore' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=60)


def test_the_extra_is_named_where_it_is_missing() -> None:
    program = (
        "import sys\n"
        "sys.modules['obstore'] = None  # an import of it raises\n"
        "from supervisor.checkpoint.location import Remote\n"
        "from supervisor.checkpoint.storage import open_storage\n"
        "from supervisor.errors import ConfigError\n"
        "try: open_storage(Remote('s3://b/x'), None)\n"
        "except ConfigError as error: assert 'everstep[cloud]' in str(error), error\n"
        "else: sys.exit('not refused')\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=60)


@pytest.mark.xdist_group("shape")
def test_groups_of_tests_are_kept_together(request: pytest.FixtureRequest) -> None:
    """Else every test process would start a SLURM cluster, a store and a browser of its own, and say nothing.

    pytest-xdist puts the group behind the id of a test, in a way that not every version of pytest heeds.
    """
    grouped = request.config.getoption("loadgroup", False)
    assert request.node.nodeid.endswith("@shape") is bool(grouped)
