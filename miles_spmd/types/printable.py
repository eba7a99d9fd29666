"""Text of others (models, reward functions, data) made fit for a terminal or a page."""

from __future__ import annotations

import unicodedata

MAX_LINE = 10_000  # characters of a message on the terminal

# Control characters and terminal escapes, formats such as those that reverse the direction of what follows, halves of
# surrogate pairs, and separators of lines that only some readers take for one.
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_LAYOUT = "\n\t"
_JOINERS = "\u200c\u200d"  # parts of words and of emojis


def printable(text: str, limit: int) -> str:
    r"""Return ``text`` with unprintable characters as escapes such as ``\x1b``, and its middle left out where it has
    more than ``limit`` characters."""
    if len(text) > limit:
        half = limit // 2
        text = f"{text[:half]} [... {len(text) - 2 * half:,} characters left out ...] {text[-half:]}"
    if text.isprintable():
        return text
    return "".join(character if _is_printable(character) else _escaped(character) for character in text)


def error_text(error: BaseException, limit: int) -> str:
    """Return class and message of an exception of somebody's code, whatever its own ``__str__`` does."""
    try:
        message = str(error)
    except Exception:
        message = ""
    return printable(f"{type(error).__name__}{': ' if message else ''}{message}", limit)


def _is_printable(character: str) -> bool:
    return character in _LAYOUT or character in _JOINERS or unicodedata.category(character) not in _UNPRINTABLE


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
