"""``snapshot_download`` and ``hf_hub_download`` with the signatures of huggingface_hub, served by the cache.

    from modelcache import hf

    folder = hf.snapshot_download("org/model", allow_patterns="*.safetensors")
    file = hf.hf_hub_download("org/model", "config.json")

For programs whose code cannot change, :func:`patch` replaces the two functions of huggingface_hub. All settings come
from the environment and the configuration file, as for :class:`modelcache.ModelCache`.

The returned paths are in a Hugging Face cache below the cache directory, and their artifacts are leased until the end
of the process. If huggingface_hub is installed, errors have its classes, such as ``EntryNotFoundError``; otherwise they
are subclasses of :class:`modelcache.ModelCacheError`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from . import _progress
from ._cache import ModelCache
from ._errors import InvalidError, ModelCacheError, NotFoundError, UnauthorizedError, UnavailableError

__all__ = ["hf_hub_download", "patch", "snapshot_download"]

_PREFIXES = {None: "", "model": "", "dataset": "datasets/", "space": "spaces/"}
_LOCK = threading.Lock()
# Arguments about the transport of huggingface_hub, which have no meaning here: the cache has its own settings.
_TRANSPORT = frozenset(
    {
        "etag_timeout",
        "headers",
        "library_name",
        "library_version",
        "local_dir_use_symlinks",
        "max_workers",
        "proxies",
        "resume_download",
        "user_agent",
    }
)
# Text in a message of the library, and the exception of huggingface_hub.
_MESSAGES = {
    "is gated": "GatedRepoError",
    "there is no revision": "RevisionNotFoundError",
    "there is no repository": "RepositoryNotFoundError",
}


_opened: list[ModelCache] = []
# Not empty once `patch` has run in this process. A child that was not forked inherits `HF_HUB_CACHE` only.
_patched: list[bool] = []


def _cache() -> ModelCache:
    """Return the cache of this module, opened at the first call."""
    with _LOCK:
        if not _opened:
            _opened.append(ModelCache(layout="hub"))
        return _opened[0]


def snapshot_download(
    repo_id: str,
    *,
    repo_type: str | None = None,
    revision: str | None = None,
    local_dir: str | os.PathLike[str] | None = None,
    force_download: bool = False,
    token: bool | str | None = None,
    local_files_only: bool = False,
    allow_patterns: list[str] | str | None = None,
    ignore_patterns: list[str] | str | None = None,
    tqdm_class: type | None = None,
    **options: Any,
) -> str:
    """Download a repository unless it is in the cache, and return the path of its folder.

    The arguments are those of ``huggingface_hub.snapshot_download``. Arguments about its transport, such as
    ``max_workers`` and ``etag_timeout``, are accepted and have no effect: the cache has its own settings.

    :param force_download: resolve the revision again, and verify all files on disk against their digests.
    :param tqdm_class: a progress bar class. By default, notebooks and terminals show the progress, unless
        ``HF_HUB_DISABLE_PROGRESS_BARS`` or ``disable_progress_bars()`` of huggingface_hub switches it off.
    :param local_dir: as ``local_dir`` of :meth:`modelcache.ModelCache.get`.
    :raises InvalidError: an argument is not supported: ``cache_dir``, ``endpoint`` or ``dry_run``.
    """
    _refuse_unsupported("snapshot_download", options)
    return _get(
        _repository(repo_id, repo_type),
        revision,
        None,
        allow_patterns=allow_patterns,
        ignore_patterns=ignore_patterns,
        local_dir=local_dir,
        force_download=force_download,
        token=token,
        local_files_only=local_files_only,
        progress=_progress_argument(tqdm_class),
    )


def hf_hub_download(
    repo_id: str,
    filename: str,
    *,
    subfolder: str | None = None,
    repo_type: str | None = None,
    revision: str | None = None,
    local_dir: str | os.PathLike[str] | None = None,
    force_download: bool = False,
    token: bool | str | None = None,
    local_files_only: bool = False,
    tqdm_class: type | None = None,
    **options: Any,
) -> str:
    """Download one file of a repository unless it is in the cache, and return its path.

    The arguments are those of ``huggingface_hub.hf_hub_download``; see :func:`snapshot_download`.
    """
    _refuse_unsupported("hf_hub_download", options)
    return _get(
        _repository(repo_id, repo_type),
        revision,
        f"{subfolder}/{filename}" if subfolder else filename,
        local_dir=local_dir,
        force_download=force_download,
        token=token,
        local_files_only=local_files_only,
        progress=_progress_argument(tqdm_class),
    )


def patch() -> None:
    """Let huggingface_hub, and programs that use it, download through the cache.

    Replaces ``snapshot_download`` and ``hf_hub_download`` under these names in all loaded modules, and in those that are
    loaded later. Sets ``HF_HUB_CACHE`` to the Hugging Face cache below the cache directory. Calls with an argument that the
    cache does not support (``cache_dir``, ``local_dir``, ``endpoint``, ``dry_run``) go to the original functions. Other
    requests to the Hub, such as ``model_info``, are not affected. A second call has no effect.

    :raises ModuleNotFoundError: huggingface_hub is not installed.
    """
    constants: Any = importlib.import_module("huggingface_hub.constants")
    folder = str(_cache().cache_dir / "hub")
    if _patched:
        return
    defaults = (constants.HF_HUB_CACHE, folder)
    for module, ours in (
        ("huggingface_hub._snapshot_download", snapshot_download),
        ("huggingface_hub.file_download", hf_hub_download),
    ):
        original = getattr(importlib.import_module(module), ours.__name__)
        replacement = _replacement(ours, original, defaults)
        for loaded in list(sys.modules.values()):
            if getattr(loaded, "__dict__", {}).get(ours.__name__) is original:
                setattr(loaded, ours.__name__, replacement)
    constants.HF_HUB_CACHE = constants.HUGGINGFACE_HUB_CACHE = folder
    os.environ["HF_HUB_CACHE"] = folder
    _patched.append(True)


def _replacement(ours: Callable[..., str], original: Callable[..., Any], defaults: tuple[str, str]) -> Callable[..., Any]:
    """Return the function that replaces ``original``. ``defaults`` are the cache folders that mean "the default one"."""

    supported = _TRANSPORT | {"endpoint", "dry_run"} | set(inspect.signature(ours).parameters)

    @functools.wraps(original)
    def download(*args: Any, **kwargs: Any) -> Any:
        cache_dir = kwargs.pop("cache_dir", None)
        is_default = cache_dir is None or str(cache_dir) in defaults
        is_known = all(name in supported for name in kwargs)
        if is_default and is_known and not any(kwargs.get(name) for name in ("local_dir", "endpoint", "dry_run")):
            return ours(*args, **kwargs)
        if not is_default:
            kwargs["cache_dir"] = cache_dir
        return original(*args, **kwargs)

    return download


def _refuse_unsupported(function: str, options: dict[str, Any]) -> None:
    for name, value in options.items():
        if name in _TRANSPORT:
            continue
        if name not in ("cache_dir", "endpoint", "dry_run", "force_filename"):
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
        if value:
            hint = {
                "cache_dir": "set MODEL_CACHE_DIR instead",
                "endpoint": "set HF_ENDPOINT instead",
            }.get(name, "omit it")
            raise InvalidError(f"{function}() does not support the argument {name!r}", hint=hint)


def _repository(repo_id: str, repo_type: str | None) -> str:
    if repo_type not in _PREFIXES:
        raise InvalidError(f"repo_type={repo_type!r} is unknown", hint="use 'model', 'dataset' or 'space'")
    return f"hf://{_PREFIXES[repo_type]}{repo_id}"


def _progress_argument(tqdm_class: type | None) -> type | bool:
    """Return the argument ``progress`` of the cache: like huggingface_hub, show progress unless it is switched off."""
    if tqdm_class is not None:
        return tqdm_class
    utils = sys.modules.get("huggingface_hub.utils")
    if utils is not None:
        is_disabled: bool = utils.are_progress_bars_disabled()
    else:
        is_disabled = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in ("1", "ON", "YES", "TRUE")
    return not is_disabled and _progress.can_redraw()


def _get(
    repository: str,
    revision: str | None,
    file: str | None,
    *,
    force_download: bool,
    progress: type | bool,
    local_files_only: bool,
    token: bool | str | None,
    **arguments: Any,
) -> str:
    reference = f"{repository}@{quote(revision or 'main', safe='')}"
    try:
        path: Path = _cache().get(
            reference if file is None else f"{reference}/{quote(file)}",
            force_refresh=force_download and not local_files_only,
            verify=force_download,
            local_files_only=local_files_only,
            token=token,
            progress=progress,
            # The caller wants the files of the repository, whatever the setting.
            extract="never",
            **arguments,
        )
    except ModelCacheError as error:
        translated = _translated(error, file is not None, local_files_only)
        if translated is None:
            raise
        raise translated from error
    return str(path)


def _translated(error: ModelCacheError, has_file: bool, local_files_only: bool) -> Exception | None:
    """Return the exception that huggingface_hub raises in this case; ``None`` if it has none, or is not installed."""
    if isinstance(error, UnavailableError) or (local_files_only and isinstance(error, NotFoundError)):
        name = "LocalEntryNotFoundError"
    elif isinstance(error, (NotFoundError, UnauthorizedError)):
        # A refused credential must not look like a file that does not exist.
        absent = "EntryNotFoundError" if has_file else "RepositoryNotFoundError"
        otherwise = absent if isinstance(error, NotFoundError) else None
        found = next((kind for part, kind in _MESSAGES.items() if part in error.message), otherwise)
        if found is None:
            return None
        name = found
    else:
        return None
    try:
        kind: type[Exception] = getattr(importlib.import_module("huggingface_hub.errors"), name)
    except ModuleNotFoundError:
        return None
    # Some of these classes need the response of a server, which there is not.
    translated = kind.__new__(kind, str(error))
    Exception.__init__(translated, str(error))
    for attribute in ("response", "request", "request_id", "server_message"):
        setattr(translated, attribute, None)
    return translated
