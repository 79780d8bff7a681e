"""The two pages of docs/ that are made by a program: the library's reference and the man page.

Run by ci/docs. ``--check`` writes nothing and ends with 1 if a page is out of date, which
tests/unit/test_docs.py holds.

The reference is made by griffe2md: it is kept up (by the author of mkdocstrings), it parses the
source without importing it, so names that are loaded when they are first used are seen like any
others, it needs no network, and its Markdown reads well without being rendered. The man page is
made by walking the tree of click commands; click-man would make a page for each of the twelve.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import click
import griffe
import griffe2md

from uringmig import cli

ROOT: Final = Path(__file__).resolve().parents[1]
PACKAGE: Final = "uringmig"
#: Beside `uringmig.__all__`: what an archive and the sources of its entries are made of. Section
#: title (a room), a sentence, and the names, wherever in the room they are defined.
FURTHER: Final = (
    (
        "uringmig.archive",
        "One archive directory: open it, write entries of both tiers, check, restore and prune.",
        (
            "Archive",
            "reindex",
            "ReindexReport",
            "Entry",
            "Damage",
            "write_hot",
            "write_cold",
            "EntryLabel",
            "TierResult",
            "open_entry",
            "verify_archive",
            "ArchiveCheck",
            "EntryCheck",
            "restore_file",
            "restore_into",
            "RestoreResult",
            "prune",
            "PruneReport",
            "Decision",
        ),
    ),
    (
        "uringmig.contents",
        "A guest's memory and device state, whatever file or memory they are read from.",
        (
            "open_contents",
            "open_memory",
            "MemoryFileBlock",
            "Contents",
            "ContentsBlock",
            "WindowRead",
        ),
    ),
    (
        "uringmig.image",
        "What a manifest says of the machine whose memory an image holds.",
        ("GuestFacts", "MapRange"),
    ),
)
#: What public classes inherit from and is documented there.
BASES: Final = (
    "options.TransferOptions",
    "errors.BytesError",
    "archive.record.EntryRecord",
    "archive.record.CopyFigures",
    "image.manifest.ArchiveFields",
)
_WIDTH: Final = 92


def main() -> int:
    """Write both pages, or compare them; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, say what is stale")
    check = parser.parse_args().check
    stale = []
    for name, text in (("api.md", reference()), ("uringmig.1", man_page())):
        path = ROOT / "docs" / name
        if path.exists() and path.read_text() == text:
            continue
        stale.append(f"docs/{name}")
        if not check:
            path.write_text(text)
    if check and stale:
        sys.stderr.write(f"out of date: {', '.join(stale)}; run ci/docs and commit what it makes\n")
        return 1
    return 0


# The reference.


def reference() -> str:
    """The page docs/api.md."""
    loader = griffe.GriffeLoader(
        search_paths=[ROOT], docstring_parser=griffe.Parser.google, allow_inspection=False
    )
    package = loader.load(PACKAGE)
    # A name of the package may be a submodule's too (verify): what is imported goes before it.
    public = [package.imports[str(name)] for name in package.exports or ()]
    parts = [
        "# The library",
        "Made from the docstrings by `ci/docs`; do not edit it here. What stands here is public, "
        "everything else may change without a word.",
        f"## {PACKAGE}",
        "`from uringmig import NAME`. Everything below is one import away.",
        *(_documented(loader, path) for path in public),
    ]
    for title, sentence, names in FURTHER:
        parts += [f"## {title}", sentence]
        parts += [_documented(loader, _defined(package, title, name), where=True) for name in names]
    parts += ["## Bases of the above", "Not to be imported; here for what their heirs share."]
    parts += [_documented(loader, f"{PACKAGE}.{name}") for name in BASES]
    return "\n\n".join(parts) + "\n"


def _defined(package: Any, room: str, name: str) -> str:
    """The full path of a public name, which one module of the room defines."""
    modules = package[room.removeprefix(f"{PACKAGE}.")].modules.values()
    found = [module.path for module in modules if name in module.members]
    found = [path for path in found if not package[f"{path}.{name}".partition(".")[2]].is_alias]
    if len(found) != 1:
        raise SystemExit(f"ci/docs.py: {name} is defined {len(found)} times in {room}")
    return f"{found[0]}.{name}"


def _documented(loader: griffe.GriffeLoader, path: str, *, where: bool = False) -> str:
    """One public name; ``where`` says from which module it is imported."""
    item = loader.modules_collection[path]
    config = griffe2md.ConfigDict(
        **{
            **griffe2md.default_config,
            "heading_level": 3,
            "inherited_members": False,
            "members_order": "source",
            "show_if_no_docstring": False,
            "show_object_full_path": False,
            "show_root_full_path": False,
            "show_root_members_full_path": False,
            "show_signature_annotations": True,
            "summary": False,
        }
    )
    text = griffe2md.render_object_docs(item, config, format_md=True).strip()
    # Types are links to anchors that a plain Markdown page does not have.
    text = re.sub(r"<code>(.*?)</code>", lambda match: f"`{_plain(match[1])}`", text)
    text = re.sub(r"\[(\*\*\w+\*\*)\]\(#[^)]*\)", r"\1", text)
    text = re.sub(
        r"(?<=```python\n)(?:.+)(?=\n```)", lambda match: "\n".join(_wrapped(match[0])), text
    )
    if where:
        module, _, name = path.rpartition(".")
        heading, _, rest = text.partition("\n")
        text = f"{heading}\n\n`from {module} import {name}`\n{rest}"
    return text


def _plain(markdown: str) -> str:
    """The text of a type, without its links and escapes."""
    return re.sub(r"\\(.)", r"\1", re.sub(r"(?<!\\)\[([^][]*)\]\(#[^)]*\)", r"\1", markdown))


def _wrapped(signature: str) -> list[str]:
    """A signature that is too long for a line, one argument a line."""
    begin, depth, pieces = signature.find("(") + 1, 0, [""]
    end = signature.rfind(")", 0, signature.rfind(" ->") if " ->" in signature else None)
    if len(signature) <= _WIDTH or begin == 0:
        return [signature]
    for char in signature[begin:end]:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += char
    return [
        signature[:begin],
        *(f"    {piece.strip()}," for piece in pieces),
        signature[end:],
    ]


# The man page.


def man_page() -> str:
    """The page docs/uringmig.1, from the help of every command."""
    root: click.Group = cli.app
    commands = list(_commands(root, None, PACKAGE))
    lines = [
        f'.TH URINGMIG 1 "" "{PACKAGE} {version(PACKAGE)}" "User Commands"',
        r".\" Made from the command line's own help by ci/docs; do not edit it here.",
        ".SH NAME",
        rf"{PACKAGE} \- {_roff(root.help).rstrip('.')}",
        ".SH SYNOPSIS",
        f".B {PACKAGE}",
        '.RI [ OPTIONS ] " " COMMAND " " [ ARGUMENTS ]',
    ]
    for command, context in commands:
        title = "OPTIONS" if command is root else context.command_path.removeprefix(PACKAGE).strip()
        lines.append(f".SH {title}" if command is root else f".SS {title}")
        if command is not root:
            usage = " ".join(command.collect_usage_pieces(context))
            lines += [f".B {_roff(context.command_path)}", _roff(usage), ".PP", _roff(command.help)]
        for parameter in command.get_params(context):
            record = parameter.get_help_record(context)
            if record is not None:
                lines += [".TP", f".B {_roff(record[0].strip())}", _roff(record[1])]
        if command is root:
            lines.append(".SH COMMANDS")
    return "\n".join([*lines, *_exit_status()]) + "\n"


def _commands(
    command: click.Command, parent: click.Context | None, name: str
) -> Iterator[tuple[click.Command, click.Context]]:
    """A command and those below it, each with its context; groups that only hold others not."""
    settings = command.context_settings
    context = command.context_class(command, info_name=name, parent=parent, **settings)
    if not isinstance(command, click.Group) or parent is None:
        yield command, context
    if isinstance(command, click.Group):
        for inner in command.list_commands(context):
            found = command.get_command(context, inner)
            assert found is not None, inner
            yield from _commands(found, context, inner)


def _exit_status() -> list[str]:
    """The table in the command line's docstring."""
    match = re.search(r"^    0 done.*?(?=\n\n)", cli.__doc__ or "", re.MULTILINE | re.DOTALL)
    assert match is not None, "uringmig.cli no longer lists the exit codes"
    codes = " ".join(match[0].split())
    return [".SH EXIT STATUS", _roff(codes) + "."]


def _roff(text: str | None) -> str:
    """Text as troff reads it: one line, nothing in it a request or an escape."""
    escaped = " ".join((text or "").split()).replace("\\", r"\e").replace("-", r"\-")
    return rf"\&{escaped}" if escaped.startswith((".", "'")) else escaped


if __name__ == "__main__":
    sys.exit(main())
