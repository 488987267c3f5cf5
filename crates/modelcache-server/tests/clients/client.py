"""Runs steps with the installed huggingface_hub or transformers, and prints what came of each as JSON.

usage: client.py STEPS

STEPS is a JSON array of `[NAME, ARGUMENTS]`: a function of this file, otherwise one of huggingface_hub. The outcome of
a step is `{"value": …}`, or `{"errors": [class and base classes], "text": …}`. A returned path is described by the
digests of the files below it. The last line of the output has all outcomes; lines `pause` before it wait for a line on
the standard input.
"""

import hashlib
import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Callable

import huggingface_hub
from huggingface_hub import HfApi, HfFileSystem, file_download

MIB = 1 << 20


def digest(content: bytes) -> dict[str, Any]:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def described(path: Path) -> dict[str, Any]:
    """Returns the path and the SHA-256 of each file below it, without the client's own notes."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    inside = {file: "" if file == path else file.relative_to(path).as_posix() for file in files}
    sums = {name: digest(file.read_bytes())["sha256"] for file, name in inside.items() if not name.startswith(".cache/")}
    return {"path": str(path), "files": sums}


def tree(**arguments: Any) -> list[str]:
    return sorted(entry.path for entry in HfApi().list_repo_tree(recursive=True, **arguments))


def filesystem(root: str, file: str, start: int, end: int) -> dict[str, Any]:
    """Reads a repository in all the ways of HfFileSystem."""
    fs = HfFileSystem()
    path = f"{root}/{file}"
    info = fs.info(path)
    with fs.open(path, "rb", block_size=MIB) as stream:
        stream.seek(start)
        part = stream.read(end - start)
    return {
        "ls": sorted(fs.ls(root, detail=False)),
        "find": sorted(fs.find(root)),
        "glob": sorted(fs.glob(f"{root}/**/*.txt")),
        "size": info["size"],
        "sha256": info["lfs"]["sha256"],
        "part": digest(part),
        "cat": digest(fs.cat_file(path, start=start, end=end)),
        "suffix": digest(fs.cat_file(path, start=-1000)),
        "whole": digest(fs.read_bytes(path)),
        "has_missing": fs.exists(f"{root}/nothing"),
    }


def metadata(repo_id: str, filename: str) -> dict[str, Any]:
    found = file_download.get_hf_file_metadata(huggingface_hub.hf_hub_url(repo_id, filename))
    return {"size": found.size, "etag": found.etag, "commit": found.commit_hash}


def download_with_pause(**arguments: Any) -> str:
    """Downloads a file, with a pause between HEAD and GET."""
    http_get = file_download.http_get

    def after_pause(*args: Any, **kwargs: Any) -> Any:
        file_download.http_get = http_get
        print("pause", flush=True)
        sys.stdin.readline()
        return http_get(*args, **kwargs)

    file_download.http_get = after_pause
    return huggingface_hub.hf_hub_download(**arguments)


class Enough(Exception):
    """Ends a download early."""


def begin_download(enough: int, **arguments: Any) -> int:
    """Begins to download a file. Returns the number of bytes that arrived before it was cancelled."""
    http_get = file_download.http_get
    arrived = 0

    class Discard:
        def write(self, chunk: bytes) -> None:
            nonlocal arrived
            assert not chunk.strip(b"\0"), "the file has only zeros"
            arrived += len(chunk)
            if arrived >= enough:
                raise Enough

        def tell(self) -> int:
            return arrived

    file_download.http_get = lambda url, temp_file, **kwargs: http_get(url, Discard(), **kwargs)
    try:
        huggingface_hub.hf_hub_download(**arguments)
    except Enough:
        pass
    return arrived


def ranges(url: str, wanted: list[str], token: str = "") -> list[list[Any]]:
    """Requests ranges of a file with urllib. Returns status, `Content-Range` and digest of the body for each."""
    rows = []
    for text in wanted:
        headers = {"Range": text} | ({"Authorization": f"Bearer {token}"} if token else {})
        request = urllib.request.Request(url, headers=headers)
        try:
            response = urllib.request.urlopen(request, timeout=10)
        except urllib.error.HTTPError as error:
            response = error
        with response:
            rows.append([response.status, response.headers.get("Content-Range"), digest(response.read())["sha256"]])
    return rows


def tokenize(repo_id: str, text: str) -> dict[str, Any]:
    """Loads configuration and tokenizer with transformers."""
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(repo_id)
    tokenizer = AutoTokenizer.from_pretrained(repo_id)
    return {"hidden_size": config.hidden_size, "ids": tokenizer(text)["input_ids"]}


def outcome(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    function: Callable[..., Any] = globals().get(name) or getattr(huggingface_hub, name)
    try:
        value = function(**arguments)
    except Exception as error:
        return {"errors": [kind.__name__ for kind in type(error).__mro__], "text": str(error)}
    return {"value": described(Path(value)) if isinstance(value, (str, os.PathLike)) else value}


def main() -> None:
    outcomes = [outcome(name, arguments) for name, arguments in json.loads(sys.argv[1])]
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
