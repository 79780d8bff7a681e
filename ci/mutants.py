"""Mutations of the program, each against the tests beside it in ``mutants.toml``: who notices?

Each is made in a copy of the tree, which is what its tests import, in processes that they start
too. The tests must pass in the copy as it is; then each mutation must make one of them fail.
Exit code 0: all were noticed. 1: one was not, or does not fit its file any more.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

from uringmig import stdio

ROOT = Path(__file__).parents[1]
#: What tests need of the tree.
COPIED = ("uringmig", "tests", "perf", "ci", "pyproject.toml", "README.md")


@dataclass(frozen=True)
class Mutation:
    """Pieces of one file's text, each to be replaced, and the tests that must notice."""

    name: str
    why: str
    file: str
    tests: str
    edits: tuple[tuple[str, str], ...]

    def mutated(self, text: str) -> str:
        """The file's text with this mutation.

        Raises:
            ValueError: it does not fit.
        """
        for old, new in self.edits:
            if text.count(old) != 1:
                raise ValueError(f"{self.file} has {text.count(old)} times: {old.strip()!r}")
            text = text.replace(old, new)
        return text


def read_mutations(path: Path) -> list[Mutation]:
    """Read the table."""
    return [
        Mutation(
            one["name"],
            one["why"],
            one["file"],
            one["tests"],
            tuple((edit["old"], edit["new"]) for edit in one["edit"]),
        )
        for one in tomllib.loads(path.read_text())["mutation"]
    ]


class Copy:
    """A copy of the tree to run tests in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, folder / name)

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        """Run a program that imports from here; no compiled file of another text is used."""
        environment = os.environ | {"PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )

    def check_import(self) -> None:
        """See that it is this tree which is imported."""
        said = self.run([sys.executable, "-P", "-c", "import uringmig; print(uringmig.__file__)"])
        assert said.stdout.startswith(str(self.folder)), said

    def notices(self, tests: str) -> str | None:
        """Run tests; the first that fails, or None."""
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        done = self.run([*command, *shlex.split(tests)])
        if done.returncode == 0:
            return None
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        # Exit code 1 says that tests failed; 5, that there was none.
        assert done.returncode == 1, done.stdout + done.stderr
        assert failed, done.stdout + done.stderr
        return failed[0].split(" - ")[0].partition(" ")[2]


def main(names: list[str]) -> int:
    """Try all mutations, or those that are named; say what came of each."""
    mutations = read_mutations(Path(__file__).with_name("mutants.toml"))
    mutations = [one for one in mutations if not names or one.name in names]
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder).resolve())
        copy.check_import()
        for tests in dict.fromkeys(one.tests for one in mutations):
            if failed := copy.notices(tests):
                print(f"without any mutation: {failed}", flush=True)
                return 1
        for one in mutations:
            path = copy.folder / one.file
            text = path.read_text()
            try:
                path.write_text(one.mutated(text))
            except ValueError as error:
                print(f"NO LONGER FITS  {one.name}: {error}", flush=True)
                bad += 1
                continue
            noticed = copy.notices(one.tests)
            path.write_text(text)
            bad += noticed is None
            print(
                f"killed    {one.name}: by {noticed}"
                if noticed
                else f"SURVIVED  {one.name}: {one.why}; {one.tests}",
                flush=True,
            )
    print(f"{len(mutations) - bad} of {len(mutations)} mutations were noticed")
    return 1 if bad else 0


if __name__ == "__main__":
    # Whoever reads along may leave (`| head`); it goes on, and removes its copy at the end.
    stdio.prepare()
    raise SystemExit(main(sys.argv[1:]))
