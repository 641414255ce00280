"""The recipes of the how-to pages, to be carried out by tests as they stand there.

A recipe is what a page shows: Python files (a code block whose first line is
``# name.py``), cells (one without a name), and commands (``$ ...`` in a console block).
Nothing is changed but the ports, which a test needs for itself.
"""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Recipe"]

BLOCK = re.compile(r"^```(python|console)\n(.*?)^```", re.DOTALL | re.MULTILINE)
NAME = re.compile(r"# (\w+\.py)\n")
SETTING = re.compile(r"[A-Z_]+=\S+")


class Recipe:
    """What one page shows, and what of it was carried out.

    Args:
        text: The page.
        folder: Where its files are written to.
        ports: Port on the page to the one that is used.
    """

    def __init__(self, text: str, folder: Path, ports: dict[int, int]) -> None:
        self._ports = ports
        self._cells: list[str] = []
        self._commands: list[str] = []
        self._files: dict[str, str] = {}
        for kind, body in BLOCK.findall(self._with_ports(text)):
            name = NAME.match(body)
            if kind == "console":
                lines = [line for line in body.splitlines() if line.startswith("$ ")]
                self._commands += [line.removeprefix("$ ") for line in lines]
            elif name is None:
                self._cells.append(body)
            else:
                (folder / name[1]).write_text(body)
                self._files[name[1]] = body
        self._unused = {*self._commands, *self._cells, *self._files}

    def take_cells(self) -> list[str]:
        """Give the cells, all of which count as carried out."""
        self._unused -= set(self._cells)
        return self._cells

    def take_command(self, text: str) -> tuple[list[str], dict[str, str]]:
        """Give a command that the page shows, as arguments and settings.

        It counts as carried out, and so do the files that it names.

        Args:
            text: The command, with the page's own ports.

        Raises:
            ValueError: The page does not show it.
        """
        text = self._with_ports(text)
        if text not in self._commands:
            message = f"the page shows no {text!r}, but {self._commands}"
            raise ValueError(message)
        self._unused.discard(text)
        self._use_files(text)
        words = shlex.split(text)
        settings: dict[str, str] = {}
        while SETTING.fullmatch(words[0]):
            name, _, value = words.pop(0).partition("=")
            settings[name] = value
        return words, settings

    def unused(self) -> list[str]:
        """List what was not carried out: cells, commands and files."""
        return sorted(self._unused)

    def _with_ports(self, text: str) -> str:
        for shown, used in self._ports.items():
            text = re.sub(rf"\b{shown}\b", str(used), text)
        return text

    def _use_files(self, text: str) -> None:
        """Mark the files whose names a text has, and those that these name in turn."""
        for name, body in self._files.items():
            stem = name.removesuffix(".py")
            # pytest finds this one by itself.
            is_found = stem == "conftest" and text.startswith("pytest")
            if name in self._unused and (is_found or re.search(rf"\b{stem}\b", text)):
                self._unused.discard(name)
                self._use_files(body)
