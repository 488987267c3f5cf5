"""Hooks of MkDocs: the navigation, and links to files of the repository outside docs/.

docs/README.md is the index of the pages, and its sections are the navigation. A page that it does not name is an error.

Pages link to the repository with relative paths (`../ARCHITECTURE.md`), which work on the repository host. The site has
copies of some of these files below `repository/`. Links to other files, such as source code, become plain text.
"""

import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
# Folder of the site with copies of files outside docs/.
COPIES = "repository"
COPIED = ["*.md", "examples/*/*", "deploy/**/*"]

LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
CELL = re.compile(r"<td\b.*?</td>", re.DOTALL)
CODE = re.compile(r"(?<=<code>)[^<]+")
FENCED = re.compile(r"^(```.*?^```[^\n]*$)", re.MULTILINE | re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Read the navigation from docs/README.md."""
    config.nav = navigation((ROOT / "docs/README.md").read_text())
    return config


def navigation(index: str) -> list[object]:
    """Return each section of the index with its pages, each page once, in their order."""
    nav: list[object] = ["README.md", f"{COPIES}/README.md"]
    known = {"README.md"}
    for section in index.split("\n## ")[1:]:
        title, _, text = section.partition("\n")
        targets = [site_path("docs/README.md", target.partition("#")[0]) for _, target in LINK.findall(text)]
        pages = [page for page in dict.fromkeys(targets) if page and page not in known]
        known.update(pages)
        nav.append({title: pages})
    return nav


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the copies. They are not in the navigation unless docs/README.md names them."""
    for path in copied_paths():
        source = str(ROOT / path)
        level = InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, f"{COPIES}/{path}", abs_src_path=source, inclusion=level))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links that leave docs/ to the copies."""
    name = page.file.src_uri
    own = name.removeprefix(f"{COPIES}/") if name.startswith(f"{COPIES}/") else f"docs/{name}"

    def replaced(link: re.Match[str]) -> str:
        text, (target, mark, anchor) = link[1], link[2].partition("#")
        if not target or "://" in target or target.startswith("mailto:"):
            return link[0]
        found = site_path(own, target)
        if found is None:
            return text
        return f"[{text}]({posixpath.relpath(found, posixpath.dirname(name) or '.')}{mark}{anchor})"

    parts = FENCED.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(replaced, part) for part in parts)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let names in tables wrap after `_`, `/` and `|`, and show `\\|` in them as `|`, like the repository host."""

    def wrapped(code: re.Match[str]) -> str:
        return re.sub(r"([_/|])(?=\w)", r"\1<wbr>", code[0].replace("\\|", "|"))

    return CELL.sub(lambda cell: CODE.sub(wrapped, cell[0]), html)


def site_path(page: str, target: str) -> str | None:
    """Return where the site has the target of a link, or None if it has no copy of that file or folder.

    A file that does not exist stays as it is, so that MkDocs reports it.
    """
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir() and (ROOT / path / "README.md").is_file():
        path = f"{path}/README.md"
    if path in copied_paths() or not (ROOT / path).exists():
        return f"{COPIES}/{path}"
    return None


def copied_paths() -> list[str]:
    """Return the files of the repository that the site has copies of."""
    found = sorted(path for pattern in COPIED for path in ROOT.glob(pattern) if path.is_file())
    return [os.path.relpath(path, ROOT) for path in found if "__pycache__" not in path.parts]
