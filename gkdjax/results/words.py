"""Text that a model, a file or a server wrote, made fit to be shown: none of it is trusted."""

import unicodedata

# Joiners that writing systems and emoji need.
_HARMLESS = "\u200c\u200d"
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def visible(text: str) -> str:
    """Control characters, marks that reorder text and halves of pairs become escapes, as \\x00.

    Line breaks and tabs stay. What is left can be encoded, and cannot steer a terminal.
    """
    return "".join(_escaped(c) if _is_hidden(c) else c for c in text)


def cut(text: str, most: int) -> str:
    """The text, or its first `most` characters with the length of the whole."""
    if len(text) <= most:
        return text
    return f"{text[:most]}... ({len(text):,} characters in all)"


def _is_hidden(character: str) -> bool:
    if character in "\n\t":
        return False
    return unicodedata.category(character) in _HIDDEN and character not in _HARMLESS


def _escaped(character: str) -> str:
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
