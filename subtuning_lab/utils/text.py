"""Text that others wrote, such as names of classes and tasks, made harmless where it is shown."""

from __future__ import annotations

import re
import unicodedata

_TURNS_TEXT = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")  # as in "exe.txt" for "txt.exe"
_MARKDOWN = re.compile(r"([\\`*\[\]|~$])")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # of a traceback
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def printable(text: str) -> str:
    """Text that a terminal, a page and a database take: bytes that are no UTF-8 and control characters as escapes."""
    return "".join(_escaped(character) if _is_control(character) else character for character in text)


def lines(text: object) -> str:
    """Text of several lines for a terminal: each is `printable`."""
    return "\n".join(map(printable, str(text).split("\n")))


def without_colours(text: str) -> str:
    """`lines` without the terminal's colours, which tracebacks carry."""
    return lines(_COLOURS.sub("", text))


def markdown(value: object) -> str:
    """A value in a line or a table of Markdown, read as it is: neither mark-up nor HTML."""
    return "".join(_HTML.get(c, c) for c in _MARKDOWN.sub(r"\\\1", printable(str(value))))


def _is_control(character: str) -> bool:
    """Control characters, halves of surrogate pairs, line separators, and those that turn the direction of text."""
    category = unicodedata.category(character)
    return category in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(character) in _TURNS_TEXT


def _escaped(character: str) -> str:
    byte = ord(character) - 0xDC00  # how Python keeps a byte of a file name that is no UTF-8
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else character.encode("unicode_escape").decode()
