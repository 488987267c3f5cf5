"""Translates commands in the hints of the library to method calls. Options are already written as keywords."""

from __future__ import annotations

import re
import shlex

from ._native import keyword_of_flag

_METHODS = {
    "ls": "list_artifacts", "get": "get", "put": "put", "evict": "evict", "tag": "tag", "pin": "pin", "unpin": "unpin",
    "verify": "verify", "prune": "prune", "inspect": "inspect", "resolve": "resolve", "prewarm": "prewarm",
    "stats": "stats", "doctor": "doctor",
}  # fmt: skip
"""Method by command."""

# A command between backticks or after a colon.
_COMMAND = re.compile(r"`modelcache (?P<quoted>[^`]+)`|(?<=: )modelcache (?P<last>[^`;]+)$")


def in_python(hint: str) -> str:
    """Return a hint with method calls in place of commands. Leaves out what has no counterpart."""
    return _COMMAND.sub(_translated, hint)


def _translated(match: re.Match[str]) -> str:
    call = _call(match["quoted"] or match["last"])
    if call is None:
        return match[0]
    return call if match["quoted"] is None else f"`{call}`"


def _call(command: str) -> str | None:
    """Return the method call for a command, or ``None`` if there is none."""
    try:
        verb, *words = shlex.split(command)
    except ValueError:
        return None
    if verb not in _METHODS:
        return None
    positional: list[str] = []
    keywords: list[str] = []
    rest = iter(words)
    for word in rest:
        if verb == "ls" and word == "--remote":
            keywords.append("remote=True")
        elif word.startswith("--"):
            option = keyword_of_flag(word)
            if option is None:
                return None
            keyword, is_switch = option
            keywords.append(f"{keyword}=True" if is_switch else f'{keyword}="{next(rest, "…")}"')
        else:
            positional.append(word)
    if verb in ("put", "tag"):
        # These methods take name and version apart.
        positional[:1] = positional[0].rsplit("@", 1) if positional else []
        if not positional:
            keywords.insert(0, "…")
    return f"cache.{_METHODS[verb]}({', '.join([*map(_quoted, positional), *keywords])})"


def _quoted(word: str) -> str:
    """Return a word as a string, unless it is a placeholder such as ``NAME`` or ``PATH``."""
    return word if word.isupper() and word.isalpha() else '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'
