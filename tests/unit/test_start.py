"""How the package and its program begin: names when they are asked for, and Ctrl-C meanwhile."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from commandline import PROGRAM

import uringmig

#: Sends SIGINT to its own process when a module of a name is about to be loaded.
STRIKE = """
import os, signal, sys
class Strike:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["STRIKE_AT"]:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Strike())
"""
SCRIPT = str(Path(sys.executable).with_name("uringmig"))


def test_every_public_name_is_loaded_from_where_type_checkers_see_it() -> None:
    tree = ast.parse(Path(uringmig.__file__).read_text())
    seen = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("uringmig.")
        for alias in node.names
    }
    assert sorted(seen) == sorted(uringmig.__all__)
    for name, module in seen.items():
        assert getattr(uringmig, name) is getattr(import_module(str(module)), name)
    assert set(uringmig.__all__) <= set(dir(uringmig))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = uringmig.nothing  # type: ignore[attr-defined]  # that is the point


@pytest.mark.parametrize(
    "program",
    [
        "import uringmig; assert callable(uringmig.verify)",
        "import uringmig.verify; import uringmig; assert callable(uringmig.verify)",
        "import uringmig.cli; from uringmig import verify; assert callable(verify)",
        "from uringmig import *; assert callable(verify) and MappedRamWriter and RamBlock",
        "import sys, uringmig; assert 'numpy' not in sys.modules, 'loaded before it is needed'",
    ],
)
def test_a_name_is_the_same_whatever_was_loaded_first(program: str) -> None:
    """`uringmig.verify` is a function, and a module is called so too."""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("program", [PROGRAM, [SCRIPT]], ids=["module", "script"])
@pytest.mark.parametrize(
    "module", ["uringmig.cli", "click", "uringmig.cli.output", "uringmig.signals"]
)
def test_ctrl_c_while_it_loads_ends_it_without_a_word(
    program: list[str], module: str, tmp_path: Path
) -> None:
    """As it ends any other program: by the signal, which a shell shows as 130."""
    (tmp_path / "sitecustomize.py").write_text(STRIKE)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "STRIKE_AT": module}
    done = subprocess.run(
        [*program, "--version"], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (
        -signal.SIGINT, "", "",
    )  # fmt: skip


def test_ctrl_c_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """A shell has its background jobs ignore it."""
    (tmp_path / "sitecustomize.py").write_text(STRIKE)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "STRIKE_AT": "click"}
    done = subprocess.run(
        ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *PROGRAM, "--version"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stdout.startswith("uringmig ")
