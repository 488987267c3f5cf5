"""Tests of the built site in headless Chromium, as a reader sees it. Without Chromium they are skipped.

The environment names the program (SITE_CHROMIUM) and the built site (SITE_FOLDER).
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

SITE = Path(os.environ.get("SITE_FOLDER", Path(__file__).parents[2] / "target/site"))
TIMEOUT_MS = 60_000
CHROMIUM = os.environ.get("SITE_CHROMIUM")

pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason="chromium is not on the PATH; on Debian and Ubuntu: apt-get install chromium"
)


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of the site on a server for files."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(SITE))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """A page. Fails at the end if a page of the test sent a request to another host or had an error."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url))
    yield page
    context.close()
    assert not [text for text in complaints if not text.startswith((address, "data:"))]


def test_every_page_fits_a_phone_and_has_its_images(page: Page, address: str) -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    files = sorted(str(file.parent.relative_to(SITE)) for file in SITE.rglob("index.html"))
    assert len(files) > 20
    for file in files:
        page.goto(f"{address}{file}/")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, file
        broken = "[...document.images].filter(image => !image.naturalWidth || !image.alt).map(image => image.src)"
        assert page.evaluate(broken) == [], file


def test_the_search_finds_a_page_and_leads_to_it(page: Page, address: str) -> None:
    page.goto(f"{address}tutorials/hf/")
    expect(page.locator(".md-search-result__meta")).to_have_text("Type to start searching", timeout=TIMEOUT_MS)
    page.get_by_placeholder("Search").press_sequentially("rollback")
    result = page.locator(".md-search-result__item a").filter(has_text="Versions, tags and rollback in a bucket")
    result.first.click(timeout=TIMEOUT_MS)
    expect(page).to_have_url(re.compile(f"{re.escape(address)}tutorials/s3/"))


def test_the_copy_button_copies_commands_without_prompts_and_output(page: Page, address: str) -> None:
    page.goto(f"{address}tutorials/s3/")
    block = page.locator("div.highlight").filter(has_text="aws s3 cp s3://models/fraud/1/weights.bin -")
    block.hover()
    block.get_by_role("button").click()
    expect(page.get_by_text("Copied to clipboard")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "aws s3 cp s3://models/fraud/1/weights.bin -"
