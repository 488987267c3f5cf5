"""Tests of the documentation and of the site that is built from it. `cargo xtask site` runs them.

The environment names the folder of the programs `modelcache` and `testkit` (SITE_PROGRAMS), the built site
(SITE_FOLDER), and the built example of the Rust tutorial (SITE_RUST_EXAMPLE).
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from console import Command, Shell, blocks, commands, matches

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PROGRAMS = Path(os.environ.get("SITE_PROGRAMS", ROOT / "target/debug"))
SITE = Path(os.environ.get("SITE_FOLDER", ROOT / "target/site"))
RUST_EXAMPLE = Path(os.environ.get("SITE_RUST_EXAMPLE", ROOT / "target/debug/examples/tutorial"))
TUTORIALS = sorted(path.name for path in (DOCS / "tutorials").glob("*.md"))
# The most console blocks of the tutorials that are not run.
NOT_RUN_MAX = 5

PAGES = sorted(path for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md") for path in ROOT.glob(pattern))


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment without settings, with the programs on the PATH and a home of its own."""
    (tmp_path / "home").mkdir()
    return {
        "PATH": f"{PROGRAMS}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path / "home"),
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        "MODEL_CACHE_DIR": str(tmp_path / "home/.cache/modelcache"),
        # The disk of a test machine may be nearly full.
        "MODEL_CACHE_MIN_FREE_BYTES": "0",
        # As on a terminal.
        "MODEL_CACHE_LOG": "warn",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder, with the examples of the repository."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


@pytest.fixture
def shell(environment: dict[str, str], folder: Path) -> Iterator[Shell]:
    shell = Shell(folder, environment)
    yield shell
    shell.close()


@pytest.mark.parametrize("name", TUTORIALS)
def test_the_commands_of_a_tutorial_print_what_it_shows(name: str, shell: Shell, folder: Path) -> None:
    page = (DOCS / "tutorials" / name).read_text()
    for block in blocks(page):
        if block.title and not block.reason:
            (folder / block.title).write_text(block.text)
        if block.language != "console" or block.reason:
            continue
        for command in commands(block):
            code, printed = shell.run(command.text)
            at = f"docs/tutorials/{name}:{command.line}: $ {command.text}"
            text = "\n".join(printed)
            assert code == 0, f"{at}\nended with {code}:\n{text}"
            wanted = "\n".join(command.output)
            assert not command.output or matches(command.output, printed), f"{at}\nprinted:\n{text}\nnot:\n{wanted}"


def test_few_blocks_of_the_tutorials_are_not_run() -> None:
    found = [block for name in TUTORIALS for block in blocks((DOCS / "tutorials" / name).read_text())]
    reasons = Counter(block.reason for block in found if block.language == "console" and block.reason)
    print(f"not run: {dict(reasons)}")
    assert reasons.total() <= NOT_RUN_MAX
    assert {block.language for block in found} <= {"console", "python", "rust", "text", "yaml", "json", "toml"}


@pytest.mark.parametrize(
    ("page", "language", "source"),
    [
        ("tutorials/fastapi.md", "python", "examples/fastapi/app.py"),
        ("tutorials/rust.md", "rust", "crates/modelcache/examples/tutorial.rs"),
    ],
)
def test_code_of_a_tutorial_is_a_part_of_its_source(page: str, language: str, source: str) -> None:
    found = [block.text for block in blocks((DOCS / page).read_text()) if block.language == language]
    assert found
    for text in found:
        assert text in (ROOT / source).read_text(), f"{source} has no such lines:\n{text}"


def test_the_program_of_the_rust_tutorial_prints_what_it_shows(environment: dict[str, str], folder: Path) -> None:
    if not RUST_EXAMPLE.is_file():
        pytest.skip(f"{RUST_EXAMPLE} is not built")
    shown = [each.output for each in console_commands(DOCS / "tutorials/rust.md") if each.text.startswith("cargo run")]
    ran = subprocess.run([RUST_EXAMPLE], cwd=folder, env=environment, text=True, capture_output=True)
    assert ran.returncode == 0, ran.stderr
    assert [matches(output, ran.stdout.splitlines()) for output in shown] == [True], ran.stdout


def console_commands(page: Path) -> list[Command]:
    """Return the commands of all console blocks of a page."""
    found = [block for block in blocks(page.read_text()) if block.language == "console" and block.text.startswith("$ ")]
    return [command for block in found for command in commands(block)]


# --- The terminal recording -------------------------------------------------------------------------------------------


def test_the_recording_shows_what_its_script_prints_today(tmp_path: Path) -> None:
    command = [sys.executable, DOCS / "site/recording.py", "--programs", PROGRAMS, "--fast", tmp_path / "recording.svg"]
    subprocess.run(command, check=True)
    kept = (DOCS / "recording.svg").read_text()
    assert last_frame(kept) == last_frame((tmp_path / "recording.svg").read_text()), (
        "make it again: cargo xtask site --recording docs/recording.svg"
    )
    assert "downloading from origin" in kept, "the progress bar is not visible"
    assert len(kept) < 150_000 and not re.search(r"<script|https?://(?!www\.w3\.org/2000/svg)", kept)


def last_frame(recording: str) -> str:
    """Return the description of a recording, without spaces, measured numbers and the phases of the download."""
    found = re.search("<desc.*?>(.*)</desc>", recording, re.DOTALL)
    assert found
    text = re.sub(r"\([^()]*;disk", "(disk", re.sub(r"\s", "", found[1]))
    return re.sub(r"\d+(\.\d+)?(ms|s|[kMGT]?B)?", "#", text)


# --- Commands of the other pages --------------------------------------------------------------------------------------


def shown_commands() -> list[tuple[str, str]]:
    """Return the commands of the README and of the pages in docs/ that run modelcache, each with its page."""
    pages = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
    found = [(page_id(page), command.text) for page in pages for command in console_commands(page)]
    return [(page, text) for page, text in found if re.match(r"(\w+=\S+ )*modelcache ", text)]


def test_the_readme_shows_commands() -> None:
    assert [page for page, _ in shown_commands()].count("README.md") >= 5


@pytest.mark.parametrize(("page", "command"), shown_commands())
def test_the_program_accepts_a_command_of_a_page(page: str, command: str, folder: Path, shell: Shell) -> None:
    """Runs the command offline, with stand-ins for the files and programs that it names."""
    (folder / "model").mkdir()
    (folder / "model/weights.bin").write_text("weights")
    (folder / "vllm").write_text("#!/bin/sh\n")
    (folder / "vllm").chmod(0o755)
    (folder / "serve.py").touch()
    shell.run(f"export MODEL_CACHE_OFFLINE=1 PATH={shlex.quote(str(folder))}:$PATH")
    # `serve` would not end. With --check it reads the same arguments and settings.
    without_comment = re.sub(r"\s#\s.*", "", command)
    ending = re.sub(r"\s&\s*$", "", without_comment).replace("modelcache serve", "modelcache serve --check")
    code, printed = shell.run(ending)
    text = "\n".join(printed)
    # Exit code 2 is a command line that is refused. Offline, artifacts of an origin are not found: 3, or 1 for KServe.
    verb = ending.split("modelcache ")[1].split()[0]
    accepted = {"storage-initializer": {1}, "doctor": {0, 1, 3, 4, 7}}
    assert code in accepted.get(verb, {0, 3}), f"{page}: {command}\nended with {code}:\n{text}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_a_console_block_begins_with_a_command(page: Path) -> None:
    found = [block for block in blocks(page.read_text()) if block.language == "console"]
    assert not [block.line for block in found if not block.text.startswith("$ ")]


# --- Links ------------------------------------------------------------------------------------------------------------

LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```[^\n]*$", re.MULTILINE | re.DOTALL)


def anchors(page: str) -> set[str]:
    """Return the anchors of the headings of a page, as the repository host makes them."""
    found: Counter[str] = Counter()
    names = set()
    for heading in re.findall(r"^#{1,6} (.+?)\s*#*$", FENCED.sub("", page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        names.add(name if not found[name] else f"{name}-{found[name]}")
        found[name] += 1
    return names


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_of_a_page_lead_to_files_and_headings(page: Path) -> None:
    text = FENCED.sub("", page.read_text())
    broken = []
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            broken.append(target)
    assert not broken


def test_the_index_names_every_page() -> None:
    targets = {target.partition("#")[0] for target in LINK.findall((DOCS / "README.md").read_text())}
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} - {"README.md"}
    assert pages <= targets, f"docs/README.md does not name {sorted(pages - targets)}"


# --- The built site ---------------------------------------------------------------------------------------------------


class Resources(HTMLParser):
    """Collects the addresses that a browser loads with a page."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "link" and values.get("rel") in ("canonical", "prev", "next", "edit", "alternate"):
            return
        if tag in ("link", "script", "img", "iframe", "source", "video", "audio"):
            self.urls += [url for url in (values.get("href"), values.get("src")) if url]


def test_the_site_loads_nothing_from_other_servers() -> None:
    pages = list(SITE.rglob("*.html"))
    assert len(pages) > len(TUTORIALS)
    for page in pages:
        resources = Resources()
        resources.feed(page.read_text())
        assert not [url for url in resources.urls if re.match(r"(\w+:)?//", url)], page
        # The theme would load the program for diagrams.
        assert 'class="mermaid"' not in page.read_text(), page
    styles = "".join(path.read_text() for path in SITE.rglob("*.css"))
    assert not re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//[^)]*", styles)


def test_the_search_of_the_site_knows_the_tutorials() -> None:
    index = (SITE / "search/search_index.json").read_text()
    missing = [name for name in TUTORIALS if name != "README.md" and f"tutorials/{Path(name).stem}/" not in index]
    assert not missing
