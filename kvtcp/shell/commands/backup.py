"""Commands for everything that is stored: backups, import and export.

`verify` needs no server: it reads the backup's directory from here. `backup` and `restore` are done by the servers in
their own backup directory, which the shell does not know. So `restore` takes a backup's name and refuses a path: a
backup of the same name in another place could have other content. BACKUPS, the default backup directory of the servers,
may stand before the name, and `verify` searches it for a name.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Literal

from kvtcp.errors import DataError
from kvtcp.shell.command import Arguments, Command
from kvtcp.shell.context import Context
from kvtcp.shell.exits import Exit, UsageError
from kvtcp.shell.output import Output
from kvtcp.shell.transfer import export_file, import_file


async def _backup(context: Context, arguments: Arguments, output: Output) -> Exit:
    name = arguments.words["NAME"].text() if "NAME" in arguments.words else None
    client = await context.client()
    with context.progress_bar("backup") as bar:
        answer = await client.backup(name, progress=bar.report)
    output.record(answer)
    return Exit.OK


def _backup_name(text: str) -> str:
    """The name of a backup: the word itself, without `backups/` before it. Raises UsageError for every other path."""
    name = text.removeprefix(BACKUPS + "/").removesuffix("/") if text.startswith(BACKUPS + "/") else text
    if "/" in name:
        raise UsageError(
            "restore takes the name of a backup in the servers' backup directory, not a path; copy it there first"
        )
    if not name:
        raise UsageError(f"{text!r} does not name a backup")
    return name


async def _restore(context: Context, arguments: Arguments, output: Output) -> Exit:
    name = _backup_name(arguments.words["NAME"].text())
    prefix = context.content(arguments.options["prefix"]) if "prefix" in arguments.options else None
    mode: Literal["merge", "replace"] = "replace" if "replace" in arguments.flags else "merge"
    dry_run = "dry-run" in arguments.flags
    client = await (context.client() if dry_run else context.writer())
    with context.progress_bar("restore") as bar:
        answer = await client.restore(name, mode, prefix=prefix, dry_run=dry_run, progress=bar.report)
    output.record(answer)
    return Exit.OK


async def _verify(context: Context, arguments: Arguments, output: Output) -> Exit:
    text = arguments.words["DIR"].text()
    output.record(_verified(text, Path(os.path.expanduser(text))))  # noqa: ASYNC240 - nothing else runs
    return Exit.OK


def _verified(text: str, directory: Path) -> dict[str, Any]:
    """The report on the backup in a directory, or in BACKUPS where a mere name is no directory here."""
    from kvtcp.storage.backup import archive

    usual = Path(BACKUPS) / directory.name
    is_elsewhere = not directory.exists() and usual.is_dir()
    if is_elsewhere and "/" not in text:
        return asdict(archive.verify(usual))
    try:
        return asdict(archive.verify(directory))
    except DataError as error:
        if not is_elsewhere:
            raise
        raise DataError(f"{error.message}; did you mean {usual}?") from error


async def _import(context: Context, arguments: Arguments, output: Output) -> Exit:
    count = await import_file(context, arguments.words["FILE|-"].text())
    output.scalar(f"imported {count}", {"imported": count})
    return Exit.OK


async def _export(context: Context, arguments: Arguments, output: Output) -> Exit:
    path = arguments.words["FILE|-"].text()
    count = await export_file(context, path)
    if path != "-":  # the data is on stdout then, and nothing else may be
        output.scalar(f"exported {count}", {"exported": count})
    return Exit.OK


BACKUPS: Final = "backups"
_JSON_LINES: Final = 'JSON lines as of `scan -o jsonl`: {"key": "user:1", "value": "Ada", "ttl_ms": 60000}.'

COMMANDS: Final = (
    Command("backup [NAME]", "write a backup of one point in time", "backup before-upgrade", _backup,
            "The servers write JSON lines and a manifest to their backup directory."),
    Command("verify DIR", "check every hash and count of a backup, without a server",
            "verify backups/before-upgrade", _verify,
            "Exit code 7 if anything is missing or damaged. A name that is no directory here is\n"
            "looked for in backups/."),
    Command("restore NAME [merge|replace] [prefix=P] [dry-run]", "write the pairs of a backup back",
            "restore before-upgrade replace", _restore,
            "merge (the default) keeps keys that the backup lacks, replace removes them and first saves what is there\n"
            "as backup before-restore-<time>. NAME is a backup in the servers' backup directory (backups/NAME is the\n"
            "same); a backup that is kept elsewhere is copied there first."),
    Command("import FILE|-", "store the pairs of a file of JSON lines", "import users.jsonl.gz\nimported 1000", _import,
            _JSON_LINES + "\nPlain or gzip. Existing keys are replaced. A file is checked as a whole before the first\n"
            "pair is stored; of a pipe the pairs before a bad line are stored, and their number is shown."),
    Command("export FILE|-", "write every pair to a file of JSON lines", "export all.jsonl.gz\nexported 1000", _export,
            _JSON_LINES + "\nSorted by key; gzip if the name ends in .gz. The file appears when it is complete.\n"
            "`scan P -o jsonl` exports the keys with prefix P."),
)
