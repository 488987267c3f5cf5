"""Translates the hints of the library, which name commands and flags, to the methods and keywords of this package."""

from __future__ import annotations

import re
import shlex

_METHODS = {
    "ls": "list_artifacts", "get": "get", "put": "put", "evict": "evict", "tag": "tag", "pin": "pin", "unpin": "unpin",
    "verify": "verify", "prune": "prune", "inspect": "inspect", "resolve": "resolve", "prewarm": "prewarm",
    "stats": "stats", "doctor": "doctor",
}  # fmt: skip
"""Method by command."""
_SWITCHES = {
    "--force": "force", "--refresh": "force_refresh", "--repair": "repair", "--verify": "verify",
    "--offline": "offline", "--local-files-only": "local_files_only", "--sidecar": "sidecar", "--dry-run": "dry_run",
    "--read-only": "read_only", "--require-checksum": "require_checksum",
}  # fmt: skip
"""Keyword by flag without a value."""
_OPTIONS = {
    "--tier": "tier", "--expect": "expect", "--revision": "revision", "--include": "allow_patterns",
    "--exclude": "ignore_patterns", "--into": "local_dir", "--timeout": "timeout", "--remote": "remote",
    "--config": "config", "--max-bytes": "max_bytes", "--min-free-bytes": "min_free_bytes", "--origin": "origin",
    "--retry-deadline": "retry_deadline", "--read-timeout": "read_timeout", "--older-than": "older_than", "--to": "to",
}  # fmt: skip
"""Keyword by flag with a value."""

# A command between backticks or after a colon; or a flag, with its value if it is one of those that hints give one.
_COMMAND_OR_FLAG = re.compile(
    r"`modelcache (?P<command>[^`]+)`|(?<=: )modelcache (?P<last>[^`;]+)$"
    r"|(?<![\w-])(?P<flag>--[a-z][a-z-]*)(?:(?<=--tier|remote|expect) (?P<value>[^\s`,;)]+))?"
)


def in_python(hint: str) -> str:
    """Return a hint with methods and keywords in place of commands and flags. Leaves out what has no counterpart."""
    return _COMMAND_OR_FLAG.sub(_translated, hint)


def _translated(match: re.Match[str]) -> str:
    if match["command"] is not None:
        call = _call(match["command"])
        return match[0] if call is None else f"`{call}`"
    if match["last"] is not None:
        return _call(match["last"]) or match[0]
    return _keyword(match["flag"], match["value"]) or match[0]


def _keyword(flag: str, value: str | None) -> str | None:
    if flag in _SWITCHES:
        return f"{_SWITCHES[flag]}=True"
    if flag in _OPTIONS:
        return _OPTIONS[flag] if value is None else f'{_OPTIONS[flag]}="{value}"'
    return None


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
            keyword = _keyword(word, next(rest, None) if word in _OPTIONS else None)
            if keyword is None:
                return None
            keywords.append(keyword)
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
