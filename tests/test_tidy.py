"""The shape of the tree, checked: who may import whom, purity, sizes, words that must not appear.

Each rule is a function from one parsed module to complaints; `test_rule_can_fail` gives each a bad
snippet, so that a rule that no longer sees anything is noticed.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import Final

import pytest
from arrows import (
    ARROWS,
    FLOORS,
    MODULES,
    NAMES,
    PACKAGE,
    ROOT,
    Module,
    arrow_of,
    arrows_between_rooms,
    arrows_hold,
    goes_down,
    imports,
    own_imports,
    prefixes,
    print_table,
    room_of,
)

import uringmig

#: Modules and rooms that can neither do I/O nor tell time; `arrows.ARROWS` says whom they import.
PURE: Final = frozenset(
    [
        "format",
        "pages",
        "transfer.plan",
        "transfer.slots",
        "storage.requests",
        "image.changed",
        "image.manifest",
        "image.digest",
        "image.window",
        "archive.coldformat",
        "archive.copyjournal",
        "archive.record",
        "batch.job",
        "qemu.address",
        "batch.journal",
        "batch.messages",
        "batch.admission",
        "archive.retention",
    ]
)
IMPURE_IMPORTS: Final = frozenset(
    [
        "os",
        "io",
        "socket",
        "mmap",
        "select",
        "selectors",
        "threading",
        "multiprocessing",
        "subprocess",
        "time",
        "liburing",
        "pathlib",
        "asyncio",
        "concurrent",
        "fcntl",
        "shutil",
        "signal",
        "tempfile",
        "ctypes",
    ]
)

#: The two that ask C liburing for a ring: one to use it, one to know beforehand whether it could.
LIBURING_USERS: Final = frozenset({"storage.ring", "storage.enginechoice"})

#: Who may make options of single settings: each of the others would forget one of them one day.
OPTIONS_MAKERS: Final = frozenset(
    ["options", "cli.parameters", "batch.job", "cli.inspect", "bench.directory"]
)
OPTIONS_CLASSES: Final = frozenset(["TransferOptions", "WriteOptions", "ReadOptions"])

MODULE_LINES_MAX: Final = 500
TEST_LINES_MAX: Final = 700
FUNCTION_LINES_MAX: Final = 70
VAGUE_NAMES: Final = frozenset(
    ["util", "utils", "helper", "helpers", "common", "base", "manager", "managers", "misc"]
)
#: What pathlib asks of a file by name.
QUESTIONS: Final = frozenset(
    {"exists", "is_dir", "is_file", "is_mount", "is_socket", "is_fifo", "is_block_device",
     "is_char_device"}
)  # fmt: skip
VAGUE_CLASS: Final = re.compile(r"(Utils?|Helpers?|Managers?|Common)$")
OPEN_END: Final = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b(?!\(\w+\): \S)")


def other_modules() -> list[Module]:
    """Tests and benches; only the rules on size and words hold there."""
    paths = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "perf").rglob("*.py")]
    return [
        Module(str(path.relative_to(ROOT)), path.read_text(), in_package=False)
        for path in sorted(paths)
    ]


# The rules. Each takes one module and yields complaints.


def pure_stays_pure(module: Module) -> Iterator[str]:
    if not module.in_package or PURE.isdisjoint(prefixes(module.name)):
        return
    for line, name in imports(module):
        if name.split(".")[0] in IMPURE_IMPORTS:
            yield f"{line}: {module.name} is pure and imports {name}"
    for node in ast.walk(module.tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "open"
        ):
            yield f"{node.lineno}: {module.name} is pure and opens a file"


def scratch_files_have_no_names(module: Module) -> Iterator[str]:
    """A file with a name stays when the process is killed; see storage/nameless.py."""
    if module.in_package and not module.name.startswith("testing."):
        for line, text in enumerate(module.source.splitlines(), 1):
            if re.search(
                r"\b((Named|Spooled)?TemporaryFile|TemporaryDirectory|mkstemp|mkdtemp)\b", text
            ):
                yield f"{line}: scratch files are those of storage/nameless.py"


def liburing_has_one_door(module: Module) -> Iterator[str]:
    if not module.in_package or module.name == "storage.liburing":
        return
    for line, name in imports(module):
        if name.split(".")[0] == "liburing":
            yield f"{line}: only storage/liburing.py imports liburing"
        if name == f"{PACKAGE}.storage.liburing" and module.name not in LIBURING_USERS:
            yield f"{line}: {module.name} must not use storage/liburing.py"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call):
            for text in [*node.args, *(keyword.value for keyword in node.keywords)]:
                if (
                    isinstance(text, ast.Constant)
                    and isinstance(text.value, str)
                    and re.search(r"liburing.*\.so|^(lib)?uring(-ffi)?$|^liburing\.", text.value)
                ):
                    yield f"{node.lineno}: only storage/liburing.py loads liburing"


def options_are_made_in_one_place(module: Module) -> Iterator[str]:
    if not module.in_package or module.name in OPTIONS_MAKERS:
        return
    for node in ast.walk(module.tree):
        if not (isinstance(node, ast.Call) and (node.args or node.keywords)):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if name in OPTIONS_CLASSES:
            yield f"{node.lineno}: {name} made of single settings; use those there are, or .like()"


def sizes_are_bounded(module: Module) -> Iterator[str]:
    limit = MODULE_LINES_MAX if module.in_package else TEST_LINES_MAX
    count = len(module.source.splitlines())
    if count > limit:
        yield f"1: {count} lines, the limit is {limit}"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            count = (node.end_lineno or node.lineno) - node.lineno + 1
            if count > FUNCTION_LINES_MAX:
                yield f"{node.lineno}: {node.name} has {count} lines, of {FUNCTION_LINES_MAX}"


def only_output_prints(module: Module) -> Iterator[str]:
    if not module.in_package or module.name == "cli.output":
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Name) and node.id == "print":
            yield f"{node.lineno}: only cli/output.py prints"


def questions_raise_nothing(module: Module) -> Iterator[str]:
    """Pathlib's raise where a folder may not be searched or a name is too long; os.path's say no.

    Whoever opens the file then is told why.
    """
    if not module.in_package:
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of = node.func.value
            if node.func.attr in QUESTIONS and not (
                isinstance(of, ast.Attribute) and of.attr == "path"
            ):
                yield f"{node.lineno}: Path.{node.func.attr} raises where os.path's says no"


def errors_have_names(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"{node.lineno}: a bare except"
        if isinstance(node, ast.Raise) and node.exc is not None:
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if isinstance(raised, ast.Name) and raised.id in ("Exception", "BaseException"):
                yield f"{node.lineno}: raises {raised.id}, which says nothing"


def nothing_is_left_open(module: Module) -> Iterator[str]:
    for number, line in enumerate(module.source.splitlines(), 1):
        if OPEN_END.search(line):
            yield f"{number}: left open without a name and a reason: {line.strip()}"


def names_say_something(module: Module) -> Iterator[str]:
    words = set(re.split(r"[./_]", module.name.removesuffix(".py")))
    # conftest and the like are pytest's names; a word within a longer name may well mean something.
    last = {word for word in re.split(r"[./]", module.name.removesuffix(".py")) if word}
    for word in sorted((words & last) & VAGUE_NAMES):
        yield f"1: {word!r} says nothing about what is in there"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ClassDef) and VAGUE_CLASS.search(node.name):
            yield f"{node.lineno}: class {node.name} says nothing"


RULES: Final[tuple[Callable[[Module], Iterator[str]], ...]] = (
    arrows_hold,
    pure_stays_pure,
    liburing_has_one_door,
    scratch_files_have_no_names,
    options_are_made_in_one_place,
    sizes_are_bounded,
    only_output_prints,
    errors_have_names,
    questions_raise_nothing,
    nothing_is_left_open,
    names_say_something,
)


@pytest.mark.parametrize("rule", RULES)
def test_tree_is_tidy(rule: Callable[[Module], Iterator[str]]) -> None:
    modules = [*MODULES, *other_modules()]
    complaints = [f"{module.name}:{text}" for module in modules for text in rule(module)]
    assert not complaints, "\n".join(complaints)


def test_the_walk_finds_the_tree() -> None:
    """All rules hold on an empty list of modules; so the list itself is checked."""
    assert {"", "errors", "storage.requests", "transfer.plan", "storage.ring", "storage"} <= NAMES
    assert "tests/test_tidy.py" in [module.name for module in other_modules()]


def test_every_room_has_a_floor_and_a_line() -> None:
    rooms = [room for floor in FLOORS for room in floor]
    assert len(rooms) == len(set(rooms))
    assert set(rooms) == {module.room for module in MODULES} == {room_of(part) for part in ARROWS}
    assert set(rooms) <= set(ARROWS)


def test_arrows_go_down() -> None:
    """Those that the table lets, whether used or not; and no module leads back to itself."""
    up = [
        f"{part} -> {name}" for part in ARROWS for name in ARROWS[part] if not goes_down(part, name)
    ]
    assert up == []
    targets = {module.name: {target for _, target in own_imports(module)} for module in MODULES}
    tuple(TopologicalSorter(targets).static_order())  # CycleError names the circle


def test_no_arrow_is_left_over() -> None:
    """An arrow that nobody uses any more would let the next one in unseen."""
    used = {
        (module.part, arrow_of(module, target))
        for module in MODULES
        for _, target in own_imports(module)
    }
    idle = [(part, name) for part in ARROWS for name in ARROWS[part] if (part, name) not in used]
    assert idle == []


def test_the_rooms_and_arrows_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """``ci/arrows``, which docs/architecture.md names."""
    assert print_table()
    told = capsys.readouterr().out
    assert "\nstorage (" in told
    assert re.search(r", 0 up: none\n$", told)


@pytest.mark.parametrize(
    ("command", "code"),
    [(["ci/arrows"], -signal.SIGPIPE), (["ci/mutants", "no-such-mutation"], 0)],
    ids=["arrows", "mutants"],
)
def test_programs_end_quietly_when_their_reader_has_seen_enough(
    command: list[str], code: int
) -> None:
    """``ci/arrows | head``: no traceback, as with any other program."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (code, b"")


def test_an_arrow_up_is_seen() -> None:
    assert not goes_down("storage", "image")
    assert not goes_down("contents.memoryfiles", "qemu.devicestream")
    assert not goes_down("verify", "qemu"), "rooms of one floor do not import each other"
    assert goes_down("qemu", "contents.source")
    assert goes_down("image.draft", "image.manifest")
    below = Module(
        "storage.ring", "from uringmig.writer import save\nimport uringmig.storage.engine"
    )
    assert arrows_between_rooms([below]) == {"storage": {"writer": 1}}


LONG = "def long() -> None:\n" + "    pass\n" * FUNCTION_LINES_MAX

BAD: Final[list[tuple[Callable[[Module], Iterator[str]], str, str]]] = [
    (arrows_hold, "format.headers", "from uringmig.pages.runs import PageRuns"),
    (arrows_hold, "pages.zero", "import uringmig.format"),
    (arrows_hold, "storage.ring", "from uringmig.transfer.plan import make_plan"),
    (arrows_hold, "storage.ring", "from uringmig.transfer import plan"),
    (arrows_hold, "memory.source", "from uringmig.storage.engine import Engine"),
    (arrows_hold, "transfer.slots", "def f() -> None:\n    from uringmig.storage import engine"),
    (arrows_hold, "transfer.plan", "from uringmig.transfer.slots import Slots"),
    (arrows_hold, "reader", "from uringmig.writer import save"),
    (arrows_hold, "reader", "from uringmig.cli import main"),
    (arrows_hold, "cli.save", "from uringmig.testing.guests import dense"),
    (arrows_hold, "", "from uringmig.testing import guests"),
    (arrows_hold, "writer", "import uringmig"),
    (arrows_hold, "errors", "from uringmig.units import KiB"),
    (arrows_hold, "units", "from uringmig.options import PAGE_SIZE"),
    (arrows_hold, "testing.guests", "from uringmig.writer import save"),
    (arrows_hold, "format.headers", "from .constants import EOF"),
    (arrows_hold, "novelty", ""),
    (arrows_hold, "batch.pool", "from uringmig.bench.trial import Workbench"),
    (arrows_hold, "batch.pool", "from uringmig.image.parse import parse_image"),
    (arrows_hold, "cli.save", "from uringmig import __version__"),
    (arrows_hold, "signals", "from uringmig.errors import UringmigError"),
    (pure_stays_pure, "batch.job", "import os"),
    (pure_stays_pure, "archive.retention", "import time"),
    (pure_stays_pure, "format.headers", "import os.path"),
    (pure_stays_pure, "pages.zero", "def f() -> None:\n    from time import sleep"),
    (pure_stays_pure, "transfer.plan", "import threading as t"),
    (pure_stays_pure, "transfer.slots", "data = open('x')"),
    (liburing_has_one_door, "storage.ring", "import liburing"),
    (scratch_files_have_no_names, "batch.disks", "from tempfile import NamedTemporaryFile"),
    (scratch_files_have_no_names, "batch.account", "with tempfile.TemporaryFile() as file: pass"),
    (liburing_has_one_door, "cli", "from liburing import Ring"),
    (liburing_has_one_door, "transfer.channel", "from uringmig.storage import liburing"),
    (liburing_has_one_door, "storage.pwrite", "lib = ctypes.CDLL('liburing-ffi.so.2')"),
    (liburing_has_one_door, "storage.pwrite", "lib = find_library('uring')"),
    (
        liburing_has_one_door,
        "storage.enginechoice",
        "lib = importlib.import_module('liburing.liburing')",
    ),
    (options_are_made_in_one_place, "batch.attempt", "o = ReadOptions(depth=job.depth)"),
    (options_are_made_in_one_place, "cli.save", "o = options.WriteOptions(**settings)"),
    (sizes_are_bounded, "plan", "\n" * (MODULE_LINES_MAX + 1)),
    (sizes_are_bounded, "plan", LONG),
    (sizes_are_bounded, "plan", "async " + LONG),
    (only_output_prints, "cli.save", "print('x')"),
    (errors_have_names, "plan", "try:\n    pass\nexcept:\n    pass"),
    (errors_have_names, "plan", "raise Exception('x')"),
    (errors_have_names, "plan", "raise BaseException"),
    (questions_raise_nothing, "profile", "there = Path(name).exists()"),
    (questions_raise_nothing, "batch.disks", "block = nodes[0].is_block_device()"),
    (nothing_is_left_open, "plan", "x = 1  # TO" + "DO later"),
    (nothing_is_left_open, "plan", "# FIX" + "ME"),
    (names_say_something, "storage.utils", ""),
    (names_say_something, "tests/helpers.py", ""),
    (names_say_something, "plan", "class PageManager:\n    pass"),
]

GOOD: Final[list[tuple[Callable[[Module], Iterator[str]], str, str]]] = [
    (arrows_hold, "transfer.plan", "from uringmig.pages.runs import PageRuns\nimport numpy"),
    (arrows_hold, "transfer.plan", "from uringmig import errors, units"),
    (arrows_hold, "writer", "from uringmig.storage.ring import RingEngine"),
    (arrows_hold, "cli.save", "from uringmig.version import text\nimport uringmig.options"),
    (arrows_hold, "", "from uringmig.writer import MappedRamWriter"),
    (arrows_hold, "testing.faults", "from uringmig.storage.engine import Engine"),
    (pure_stays_pure, "writer", "import os"),
    (pure_stays_pure, "format.headers", "import struct"),
    (liburing_has_one_door, "storage.ring", "from uringmig.storage import liburing"),
    (liburing_has_one_door, "cli.output", "print('install liburing 2.4 or newer')"),
    (options_are_made_in_one_place, "writer", "o = WriteOptions()\np = o.like(ReadOptions)"),
    (options_are_made_in_one_place, "cli.parameters", "o = ReadOptions(depth=depth)"),
    (sizes_are_bounded, "plan", LONG.replace("    pass\n", "", 1)),
    (only_output_prints, "cli.output", "print('x')"),
    (errors_have_names, "plan", "raise ValueError('x')"),
    (questions_raise_nothing, "profile", "there = os.path.exists(name)"),
    (nothing_is_left_open, "plan", "# TO" + "DO(ann): when Python 3.11 is gone"),
    (names_say_something, "cli.output", "class Plan:\n    pass"),
]


@pytest.mark.parametrize(("rule", "name", "source"), BAD)
def test_rule_can_fail(rule: Callable[[Module], Iterator[str]], name: str, source: str) -> None:
    complaints = list(rule(Module(name, source, in_package=not name.endswith(".py"))))
    assert complaints
    assert all(re.match(r"\d+: ", text) for text in complaints)


@pytest.mark.parametrize(("rule", "name", "source"), GOOD)
def test_rule_lets_pass(rule: Callable[[Module], Iterator[str]], name: str, source: str) -> None:
    assert list(rule(Module(name, source))) == []


# Public names.


def undocumented(names: list[str], values: dict[str, object], readme: str) -> list[str]:
    """Public names without a docstring of their own, or without a line in the README."""
    complaints = []
    for name in names:
        value = values.get(name)
        if inspect.isclass(value) or inspect.isroutine(value):
            text = value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__
            # A dataclass without one is given its signature as its docstring.
            if not text or text.startswith(f"{name}("):
                complaints.append(f"{name} has no docstring")
        if not re.search(rf"`[^`\n]*\b{re.escape(name)}\b[^`\n]*`", readme):
            complaints.append(f"{name} has no line in README.md")
    return complaints


def test_public_names_are_documented() -> None:
    names = list(getattr(uringmig, "__all__", []))
    assert names == sorted(set(names), key=names.index), "a name is there twice"
    values = {name: getattr(uringmig, name) for name in names}
    found = undocumented(names, values, (ROOT / "README.md").read_text())
    assert not found, "\n".join(found)


def test_undocumented_names_are_seen() -> None:
    @dataclass
    class Bare:
        x: int

    class Documented:
        """Text."""

    class Heir(Documented):
        pass

    values: dict[str, object] = {"Bare": Bare, "Documented": Documented, "Heir": Heir}
    readme = "`Bare`, `Documented(x)`, Heir without quotes"
    assert undocumented(["Documented"], values, readme) == []
    assert undocumented(["Bare", "Heir"], values, readme) == [
        "Bare has no docstring",
        "Heir has no docstring",
        "Heir has no line in README.md",
    ]


# One name, one thing.


def namesakes(modules: list[Module]) -> list[str]:
    """Public classes of the package that share their name with another one of another module."""
    homes: dict[str, list[str]] = {}
    for module in modules:
        if module.in_package:
            for node in module.tree.body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    homes.setdefault(node.name, []).append(module.name)
    return [f"{name}: {', '.join(found)}" for name, found in homes.items() if len(found) > 1]


def test_no_two_public_classes_have_one_name() -> None:
    """Whoever reads a class's name anywhere in the package knows which one it is."""
    assert namesakes(MODULES) == []


def test_namesakes_are_seen() -> None:
    private = Module("archive.a", "class _File:\n    pass")
    outside = Module("tests/b.py", "class Place:\n    pass", in_package=False)
    two = [Module(name, "class Place:\n    pass") for name in ("storage.a", "archive.b")]
    assert namesakes([private, Module("archive.b", private.source), two[0], outside]) == []
    assert namesakes(two) == ["Place: storage.a, archive.b"]


# Sizes of structures.


def structs(module: Module) -> Iterator[str]:
    """The names that `struct.Struct` objects are bound to: ``NAME``, or the class's name.

    One that is bound to no name is given as its line.
    """
    bound: set[ast.AST] = set()

    def values(node: ast.stmt) -> tuple[ast.expr | None, str]:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            return node.value, node.targets[0].id
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            return node.value, node.target.id
        return None, ""

    def is_struct(node: ast.AST | None) -> bool:
        return isinstance(node, ast.Call) and ast.unparse(node.func) in ("Struct", "struct.Struct")

    for node in module.tree.body:
        owner = node.name if isinstance(node, ast.ClassDef) else None
        for inner in node.body if isinstance(node, ast.ClassDef) else [node]:
            value, name = values(inner)
            if value is not None and is_struct(value):
                bound.add(value)
                yield owner or name
    for anything in ast.walk(module.tree):
        if is_struct(anything) and anything not in bound:
            yield f"line {getattr(anything, 'lineno', 0)}"


def sized(module: Module) -> set[str]:
    """Names that appear in a test which asserts a ``.size`` or in a table such a test goes over."""
    tables: dict[str, ast.stmt] = {}
    for node in module.tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            tables[node.targets[0].id] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            tables[node.target.id] = node
    found: set[str] = set()
    for node in module.tree.body:
        if not (isinstance(node, ast.FunctionDef) and node.name.startswith("test_")):
            continue
        asserted = [part for part in ast.walk(node) if isinstance(part, ast.Assert)]
        sizes = [
            part
            for one in asserted
            for part in ast.walk(one)
            if isinstance(part, ast.Attribute) and part.attr == "size"
        ]
        if sizes:
            names = identifiers(node)
            for table in names & set(tables):
                names |= identifiers(tables[table])
            found |= names
    return found


def identifiers(node: ast.AST) -> set[str]:
    """Every name and attribute under a node, decorators included."""
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return names | {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}


def test_every_structure_has_a_size_test() -> None:
    tests = [module for module in other_modules() if module.name.startswith("tests/unit/")]
    known = set().union(*(sized(module) for module in tests))
    missing = [
        f"{module.name}: {name}"
        for module in MODULES
        if module.room == "format"
        for name in structs(module)
        if name not in known
    ]
    assert not missing, "no size test for:\n" + "\n".join(missing)


def test_missing_size_tests_are_seen() -> None:
    source = (
        "from struct import Struct\nimport struct\nWORD = struct.Struct('>Q')\n"
        "class Header:\n    STRUCT: ClassVar[Struct] = Struct('>IQ')\n"
        "def f(data):\n    return Struct('>H').unpack(data)\n"
    )
    assert list(structs(Module("format.x", source))) == ["WORD", "Header", "line 7"]
    table = Module(
        "tests/unit/test_x.py",
        "TABLE = [(Header, 12)]\n@pytest.mark.parametrize(('cls', 'size'), TABLE)\n"
        "def test_sizes(cls, size):\n    assert cls.STRUCT.size == size\n"
        "def test_other():\n    assert WORD\n",
    )
    assert "Header" in sized(table)
    assert "WORD" not in sized(table)


def test_a_modules_tests_stay_in_one_process(request: pytest.FixtureRequest) -> None:
    """Their fixtures are made once; with pytest 9.2 pytest-xdist 3.8 forgot that without a word."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        assert request.node.nodeid.endswith("@test_tidy.py")
