"""Who may import whom: the rooms of the package on their floors, and every arrow between them.

``ci/arrows`` prints the table of what is imported today; tests/test_tidy.py holds it to this one.
"""

from __future__ import annotations

import ast
import signal
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
PACKAGE: Final = "uringmig"

#: The rooms, folders or single modules, from the top down. An arrow goes to a lower floor. ``""``
#: is the package itself, which gives out what a caller of the library needs.
FLOORS: Final[tuple[tuple[str, ...], ...]] = (
    ("__main__",),
    ("cli",),
    ("",),
    ("batch", "export"),
    ("archive", "bench", "testing"),
    ("verify", "qemu"),
    ("contents",),
    ("writer", "reader"),
    ("result",),
    ("image",),
    ("transfer",),
    ("storage", "memory", "pages", "format"),
    ("progress", "starting"),
    ("options", "stdio"),
    ("units",),
    ("errors", "signals", "version"),
)
#: What everybody above them may import.
FLOOR: Final = ("errors", "units", "options")

#: Whom each room imports besides: these, and nobody else. A room lets in only those in whose line
#: it stands. A part of a room that has a line of its own may import what stands there and the
#: other modules of the part, and no more: nothing that its room may.
ARROWS: Final[dict[str, tuple[str, ...]]] = {
    "__main__": ("cli", "starting"),
    "cli": (
        "archive", "batch", "bench", "export", "format.constants", "image", "pages", "progress",
        "qemu", "reader", "signals", "stdio", "storage", "verify", "version",
    ),
    "": ("export", "format", "memory", "progress", "qemu", "reader", "result", "verify", "writer"),
    "export": (
        "archive", "contents", "format", "image", "pages", "progress", "storage", "transfer",
        "verify",
    ),
    "batch": (
        "archive", "bench.depth", "bench.profile", "contents", "progress", "qemu", "signals",
        "starting", "storage", "verify",
    ),
    "batch.admission": ("batch.job", "batch.messages"),
    "batch.job": ("qemu.address",),
    "batch.journal": (),
    "batch.messages": ("archive.record", "batch.job", "progress"),
    "archive": (
        "contents", "format", "image", "memory.source", "pages", "progress", "qemu.monitor",
        "qemu.streamload", "reader", "result", "signals", "storage", "transfer", "verify",
    ),
    "archive.coldformat": ("format", "image.digest", "pages"),
    "archive.copyjournal": ("format", "image.digest"),
    "archive.record": ("image.manifest",),
    "archive.retention": ("archive.entry",),
    "bench": (
        "format.layout", "image.savework", "image.windowview", "memory.array", "progress",
        "signals", "storage", "transfer", "writer",
    ),
    "bench.profile": ("storage",),
    "testing": ("qemu.monitor", "storage"),
    "verify": ("contents", "image", "progress", "reader", "storage"),
    "qemu": (
        "contents", "format", "image.guestfacts", "image.manifest", "image.parse", "image.sidecar",
        "memory", "pages", "progress", "result", "signals", "storage", "writer",
    ),
    "qemu.address": (),
    "qemu.guardprocess": (),
    "qemu.monitor": ("qemu.address", "qemu.guardprocess", "qemu.qmp", "signals"),
    "qemu.qmp": ("signals",),
    "contents": (
        "format", "image", "memory", "pages", "progress", "reader", "signals", "storage",
        "transfer",
    ),
    "writer": (
        "format", "image", "memory", "progress", "result", "storage", "transfer",
    ),
    "reader": ("format", "image.parse", "memory", "pages", "progress", "storage", "transfer"),
    "result": ("image.manifest", "progress"),
    "image": (
        "format", "memory.source", "pages", "progress", "signals", "storage", "transfer",
    ),
    "image.changed": ("image.digest", "image.pieces"),
    "image.digest": (),
    "image.guestfacts": ("format.constants",),
    "image.manifest": ("image.digest", "image.guestfacts"),
    "image.pieces": ("image.digest",),
    "image.window": ("pages", "transfer.plan"),
    "transfer": ("progress", "signals", "storage"),
    "transfer.plan": ("pages", "storage.requests"),
    "transfer.slots": ("storage.requests",),
    "storage": ("signals",),
    "storage.engine": ("storage.requests",),
    "storage.pwrite": ("storage.engine", "storage.requests"),
    "storage.requests": (),
    "memory": (),
    "memory.source": (),
    "pages": (),
    "format": (),
    "progress": (),
    "starting": ("stdio",),
    "options": (),
    "stdio": (),
    "units": (),
    "errors": (),
    "signals": (),
    "version": (),
}  # fmt: skip


@dataclass
class Module:
    """A parsed file; ``name`` is dotted and without the package (``storage.ring``, ``""``)."""

    name: str
    source: str
    in_package: bool = True
    tree: ast.Module = field(init=False)

    def __post_init__(self) -> None:
        self.tree = ast.parse(self.source)

    @property
    def part(self) -> str | None:
        """The longest prefix of the name that has a line in `ARROWS`."""
        return next((name for name in prefixes(self.name) if name in ARROWS), None)

    @property
    def room(self) -> str:
        """The folder right below the package, or the module there."""
        return room_of(self.name)


def prefixes(name: str) -> list[str]:
    """``a.b.c``, ``a.b``, ``a``."""
    words = name.split(".")
    return [".".join(words[:count]) for count in range(len(words), 0, -1)]


def room_of(name: str) -> str:
    """The room of a module or of a part."""
    return name.split(".")[0]


def floor_of(room: str) -> int:
    """How far from the top a room is.

    Raises:
        KeyError: it is on no floor.
    """
    return {room: number for number, floor in enumerate(FLOORS) for room in floor}[room]


def package_modules() -> list[Module]:
    """Every module of the package."""
    folder = ROOT / PACKAGE
    modules = []
    for path in sorted(folder.rglob("*.py")):
        words = list(path.relative_to(folder).with_suffix("").parts)
        if words[-1] == "__init__":
            words.pop()
        modules.append(Module(".".join(words), path.read_text()))
    return modules


MODULES: Final = package_modules()
NAMES: Final = frozenset(module.name for module in MODULES)


def imports(module: Module) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of all that is imported anywhere in the module, lazily too."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                origin = f"<relative>.{origin}"
            # "from uringmig.storage import ring" means the module ring, when there is one.
            for alias in node.names:
                full = f"{origin}.{alias.name}"
                known = full.removeprefix(f"{PACKAGE}.") in NAMES
                yield node.lineno, full if known else origin


def own_imports(module: Module) -> Iterator[tuple[int, str]]:
    """Imports of our own modules, without the package's name."""
    for line, name in imports(module):
        if name == PACKAGE or name.startswith(f"{PACKAGE}."):
            yield line, name[len(PACKAGE) + 1 :]


def goes_down(importer: str, imported: str) -> bool:
    """Whether an arrow between two modules or parts ends on a lower floor, or in its own room."""
    one, other = room_of(importer), room_of(imported)
    return one == other or floor_of(one) < floor_of(other)


def arrow_of(module: Module, target: str) -> str | None:
    """The entry of `ARROWS` (or of `FLOOR`, or the part itself) that lets ``module`` import.

    None: nothing does.
    """
    part = module.part
    assert part is not None
    for name in prefixes(target):
        if name in ARROWS[part]:
            return name
        if name in FLOOR and goes_down(part, name):
            return name
        # The whole of a room may use its inner parts, but not the other way round.
        if name == part and target != "":
            return name
    return None


def arrows_hold(module: Module) -> Iterator[str]:
    """The rule: every import of a module is one that its line lets it."""
    if not module.in_package:
        return
    if module.part is None:
        yield f"1: {module.name} has no place in the order of modules"
        return
    for line, name in imports(module):
        if name.startswith("<relative>"):
            yield f"{line}: a relative import hides its arrow"
    for line, target in own_imports(module):
        if arrow_of(module, target) is None:
            yield f"{line}: {module.name or PACKAGE} must not import {target or PACKAGE}"


def arrows_between_rooms(modules: Iterable[Module]) -> dict[str, dict[str, int]]:
    """Which rooms each room imports, and by how many pairs of modules."""
    pairs: dict[str, dict[str, set[tuple[str, str]]]] = defaultdict(lambda: defaultdict(set))
    for module in modules:
        for _, target in own_imports(module):
            if room_of(target) != module.room:
                pairs[module.room][room_of(target)].add((module.name, target))
    return {
        room: {other: len(found) for other, found in others.items()}
        for room, others in pairs.items()
    }


def print_table() -> bool:
    """Print who imports whom today, from the top down; say whether every arrow goes down."""
    arrows = arrows_between_rooms(MODULES)
    rooms = [room for floor in FLOORS for room in floor]
    up = []
    for floor in FLOORS:
        for room in floor:
            below = arrows.get(room, {})
            above = [other for other in rooms if room in arrows.get(other, {})]
            modules = sum(module.room == room for module in MODULES)
            print(f"{room or PACKAGE} ({modules})")
            for word, names in (("imports", sorted(below)), ("imported by", above)):
                print(f"    {word:12}", " ".join(name or PACKAGE for name in names) or "-")
            up += [f"{room} -> {other}" for other in below if not goes_down(room, other)]
    count = sum(len(others) for others in arrows.values())
    print(
        f"\n{len(MODULES)} modules, {len(rooms)} rooms, {count} arrows between rooms, "
        f"{len(up)} up: {', '.join(up) or 'none'}"
    )
    return not up


if __name__ == "__main__":
    # A reader that has seen enough (`| head`) ends it as it ends any other program.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(0 if print_table() else 1)
