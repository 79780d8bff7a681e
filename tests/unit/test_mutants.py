"""The mutations of ci/mutants still say something of the tree as it is."""

from __future__ import annotations

import ast
import shlex

import pytest
from mutants import ROOT, Mutation, read_mutations

MUTATIONS = read_mutations(ROOT / "ci" / "mutants.toml")


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda one: one.name)
def test_a_mutation_fits_its_file_and_names_tests_that_are_there(mutation: Mutation) -> None:
    """So that a line which moves, or a file that is renamed, makes none of them void unseen."""
    text = (ROOT / mutation.file).read_text()
    mutated = mutation.mutated(text)
    assert ast.dump(ast.parse(mutated)) != ast.dump(ast.parse(text))
    files = [word for word in shlex.split(mutation.tests) if word.startswith("tests/")]
    assert files
    assert [name for name in files if not (ROOT / name.partition("::")[0]).is_file()] == []


def test_every_mutation_has_a_name_of_its_own() -> None:
    """The name is how one is asked for."""
    assert len({one.name for one in MUTATIONS}) == len(MUTATIONS)


def test_a_mutation_that_does_not_fit_is_refused() -> None:
    """Its text must be there, and once."""
    edit = Mutation("m", "why", "x.py", "tests", (("a = 1", "a = 2"),))
    assert edit.mutated("a = 1\n") == "a = 2\n"
    for text in ("b = 1\n", "a = 1\na = 1\n"):
        with pytest.raises(ValueError, match=r"x\.py has [02] times"):
            edit.mutated(text)
