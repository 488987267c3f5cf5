"""Tests the status page of the daemon in headless Chromium.

Starts a slow stand-in for the Hugging Face Hub and `modelcache serve`, and watches the page as an operator would: a
fill's bar moves, an eviction appears, names that look like HTML do nothing, a phone can show it. Run by
`cargo xtask page`.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

TOKEN = "secret-of-the-test"
# The name of an artifact on disk, and a reference that does not exist and so gets into an error message.
HOSTILE = ("\"'><img src=x onerror=window.injected=1>", "<svg onload=window.injected=2>'&amp;\"@1")
# The same for the picture in the documentation.
HARMLESS = ("fraud-detector", "pricing/forest@7")
MB = 1_000_000
# Two artifacts have room. The one in the prewarm list is leased, so that the old one is evicted for the slow one.
SIZES = {"small": 2 * MB, "old": 6 * MB, "slow": 40 * MB}
BUDGET = 44 * MB
# Bytes per second of each connection to the stand-in.
RATE = 400_000


class Daemon:
    """A stand-in for the Hub and a daemon in front of it."""

    def __init__(self, modelcache: str, testkit: str, folder: Path, names: tuple[str, str]) -> None:
        self.modelcache, (self.name, self.missing) = modelcache, names
        self.daemon: subprocess.Popen[str] | None = None
        for name, size in SIZES.items():
            repo = folder / "hub" / "team" / name
            repo.mkdir(parents=True)
            (repo / "model.safetensors").write_bytes(random.Random(name).randbytes(size))
        hub = [testkit, "hub", "--folder", str(folder / "hub"), "--rate", str(RATE)]
        self.hub = subprocess.Popen(hub, stdout=subprocess.PIPE, text=True)
        endpoint = self.line(self.hub.stdout, r"HF_ENDPOINT=(\S+)")
        kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
        self.environment = kept | {
            "HOME": str(folder),
            "HF_ENDPOINT": endpoint,
            "MODEL_CACHE_DIR": str(folder / "cache"),
            "MODEL_CACHE_MAX_BYTES": str(BUDGET),
            "MODEL_CACHE_MIN_FREE_BYTES": "0",
            "MODEL_CACHE_TOKEN": TOKEN,
        }
        file = folder / "file"
        file.write_bytes(b"harmless")
        subprocess.run([modelcache, "--quiet", "put", f"{self.name}@1", file], env=self.environment, check=True)
        self.start("127.0.0.1:0")

    @staticmethod
    def line(lines, pattern: str) -> str:
        """Returns the group of the first line that matches, and reads on in the background."""
        seen = []
        for line in lines:
            seen.append(line)
            if found := re.search(pattern, line):
                threading.Thread(target=lambda: [None for _ in lines], daemon=True).start()
                return found[1]
        raise AssertionError(f"the program ended without {pattern!r}: {''.join(seen)}")

    def start(self, listen: str) -> None:
        command = [self.modelcache, "serve", "hf://team/small", self.missing]
        environment = self.environment | {"MODEL_CACHE_LISTEN": listen}
        self.daemon = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        self.url = self.line(self.daemon.stderr, r"serving .* at (http://\S+)")

    def stop(self) -> None:
        self.daemon.terminate()
        self.daemon.wait(timeout=30)

    def request(self, method: str, path: str, body: object = None, token: str | None = TOKEN):
        """Returns status, headers and text of a response."""
        request = urllib.request.Request(self.url + path, method=method)
        if token:
            request.add_header("Authorization", f"Bearer {token}")
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, response.headers, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read().decode()

    def close(self) -> None:
        for process in (self.daemon, self.hub):
            if process:
                process.kill()
                process.wait()


# Problems that a screen reader, a keyboard or a weak eye would have; a list of sentences.
ACCESSIBILITY = """() => {
  const problems = [];
  const shown = (element) => element.checkVisibility();
  const name = (element) => (element.getAttribute("aria-label")
    || (element.getAttribute("aria-labelledby") || "").split(" ").map((id) => document.getElementById(id)?.textContent).join("")
    || [...(element.labels || [])].map((label) => label.textContent).join("") || element.textContent).trim();
  if (!document.documentElement.lang) problems.push("the document has no language");
  if (document.querySelectorAll("h1").length !== 1) problems.push("not exactly one h1");
  let level = 0;
  for (const heading of [...document.querySelectorAll("h1,h2,h3,h4")].filter(shown)) {
    if (Number(heading.tagName[1]) > level + 1) problems.push(`heading level skipped: ${heading.textContent}`);
    level = Number(heading.tagName[1]);
  }
  const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
  for (const id of ids) if (ids.indexOf(id) !== ids.lastIndexOf(id)) problems.push(`id twice: ${id}`);
  for (const element of document.querySelectorAll("button,input,a[href],progress,[role=progressbar],section"))
    if (!name(element)) problems.push(`without a name: ${element.outerHTML}`);
  for (const table of document.querySelectorAll("table")) {
    if (!table.caption?.textContent) problems.push(`table without a caption: ${table.id}`);
    for (const cell of table.querySelectorAll("th")) if (!cell.scope) problems.push(`th without scope: ${cell.outerHTML}`);
  }
  for (const bar of document.querySelectorAll("[role=progressbar]")) {
    const value = Number(bar.getAttribute("aria-valuenow") ?? NaN);
    if (!(value >= 0 && value <= 100)) problems.push(`progressbar without aria-valuenow: ${bar.outerHTML}`);
  }
  for (const element of document.querySelectorAll("[tabindex]")) if (element.tabIndex > 0) problems.push("a tabindex above 0");
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = (colour) => {
    const [r, g, b] = channels(colour).map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = (element) => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if ((channels(colour)[3] ?? 1) === 1) return colour;
    }
    throw new Error("the page has no background");
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let texts = 0;
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !shown(element)) continue;
    texts += 1;
    const [a, b] = [luminance(getComputedStyle(element).color), luminance(background(element))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) problems.push(`contrast ${contrast.toFixed(2)}: ${walker.currentNode.textContent.trim()}`);
  }
  if (texts < 50) problems.push(`only ${texts} texts were looked at`);
  return problems;
}"""


def step(name: str) -> None:
    print(f"- {name}", flush=True)


def row(page: Page, table: str, reference: str):
    return page.locator(f"#{table} tbody tr").filter(has=page.get_by_role("rowheader", name=reference, exact=True))


def check_routes(daemon: Daemon) -> None:
    step("the page needs the token, and browsers ask for it")
    for path in ["/", "/page.js", "/page.css", "/cache/doctor"]:
        status, headers, _ = daemon.request("GET", path, token=None)
        assert status == 401 and headers["WWW-Authenticate"].startswith("Basic "), (path, status)
    step("no other site can frame the page, and nothing but its own script runs in it")
    for path in ["/", "/page.js", "/page.css"]:
        status, headers, _ = daemon.request("GET", path)
        assert status == 200, (path, status)
        policy = headers["Content-Security-Policy"]
        for part in ["default-src 'none'", "script-src 'self'", "style-src 'self'", "frame-ancestors 'none'"]:
            assert part in policy, policy
        assert "unsafe" not in policy, policy
        found = [headers[name] for name in ("X-Frame-Options", "X-Content-Type-Options", "Cache-Control")]
        assert found == ["DENY", "nosniff", "no-store"], found
    step("the doctor's route has the fields of `modelcache doctor --json`")
    status, _, text = daemon.request("GET", "/cache/doctor")
    report = json.loads(text)
    assert status == 200 and {"checks", "problems", "warnings", "exit"} <= report.keys(), text
    command = [daemon.modelcache, "doctor", "--json", "--read-only"]
    printed = json.loads(subprocess.run(command, env=daemon.environment, stdout=subprocess.PIPE, check=False).stdout)
    assert {check["area"] for check in report["checks"]} == {check["area"] for check in printed["checks"]}, text
    assert json.loads(daemon.request("GET", "/cache/doctor")[2])["at_unix"] == report["at_unix"], "it ran again"


def check_first_paint(browser, daemon: Daemon) -> None:
    step("without JavaScript the page has the data")
    context = browser.new_context(java_script_enabled=False, http_credentials=credentials())
    page = context.new_page()
    page.goto(daemon.url)
    expect(row(page, "artifact-table", f"{daemon.name}@1")).to_be_visible()
    expect(page.locator("[role=progressbar]")).to_have_attribute("aria-valuetext", re.compile(r"\d+ %"))
    expect(page.get_by_text("44.0 MB", exact=True)).to_be_visible()
    expect(page.locator("#doctor tbody tr").first).to_be_visible()
    context.close()


def credentials() -> dict[str, str]:
    return {"username": "operator", "password": TOKEN}


def check_fill_and_eviction(page: Page, daemon: Daemon, screenshot: Path) -> None:
    step("the prewarm list shows what is there and what failed")
    prewarm = row(page, "prewarm", "hf://team/small@main")
    expect(prewarm).to_contain_text("ready", timeout=60_000)
    expect(row(page, "prewarm", daemon.missing)).to_contain_text("failed")
    expect(artifact(page, "small")).to_contain_text("leased")
    step("an artifact appears when it was downloaded")
    daemon.request("POST", "/cache/artifacts", {"ref": "hf://team/old"})
    expect(artifact(page, "old")).to_contain_text("6.0 MB of 6.0 MB", timeout=10_000)
    evictions = page.locator("#evictions").inner_text()
    step("a fill's bar moves")
    fill = threading.Thread(target=daemon.request, args=("POST", "/cache/artifacts", {"ref": "hf://team/slow"}))
    fill.start()
    bar = page.locator("#fills tbody tr").filter(has_text="team/slow").locator("progress")
    expect(bar).to_be_visible(timeout=30_000)
    values: list[float] = []
    until = time.monotonic() + 60
    while len(values) < 3 and time.monotonic() < until:
        value = bar.evaluate("bar => bar.position") if bar.count() else None
        if value is not None and value > 0 and (not values or value > values[-1]):
            values.append(value)
            if len(values) == 2:
                expect(page.locator("#fills tbody tr")).to_contain_text(re.compile(r"\d [kM]B/s"))
                expect(page.locator("#fills tbody tr")).to_contain_text("origin")
                # The picture shows no temporary folder.
                page.locator("[data-text='stats.dir']").evaluate("dir => { dir.textContent = '/var/cache/modelcache' }")
                page.screenshot(path=screenshot)
        time.sleep(0.3)
    assert len(values) == 3, f"the bar did not move: {values}"
    fill.join()
    expect(bar).to_have_count(0, timeout=20_000)
    expect(page.get_by_text("No fill is running.")).to_be_visible()
    step("the artifact that was evicted for it disappears, and the eviction appears")
    expect(artifact(page, "slow")).to_be_visible()
    expect(artifact(page, "old")).to_have_count(0)
    expect(page.locator("#evictions")).not_to_have_text(evictions)
    expect(page.locator("#evictions")).to_have_text("1 (6.0 MB freed)")
    expect(page.locator("#removed")).to_contain_text("team/old")


def artifact(page: Page, name: str):
    return page.locator("#artifact-table tbody tr").filter(has_text=f"team/{name}")


def check_list(page: Page, daemon: Daemon) -> None:
    step("the list is filtered, and sorted from the keyboard")
    rows = page.locator("#artifact-table tbody tr")
    before = rows.count()
    page.get_by_label("Filter by reference").fill("TEAM/SL")
    expect(rows).to_have_count(1)
    expect(page.locator("#shown")).to_have_text(f"1 of {before} artifacts")
    page.get_by_label("Filter by reference").fill("")
    expect(rows).to_have_count(before)
    size = page.get_by_role("button", name="Size on disk")
    for direction, first in [("ascending", daemon.name), ("descending", "team/slow")]:
        size.focus()
        page.keyboard.press("Enter")
        expect(page.locator("th", has=size)).to_have_attribute("aria-sort", direction)
        expect(rows.first).to_contain_text(first)
    step("a row stays the same element when the page is updated, and the focus stays")
    rows.first.evaluate("row => { row.marked = true }")
    page.wait_for_timeout(5000)
    assert rows.first.evaluate("row => row.marked === true")
    assert size.evaluate("button => button === document.activeElement")


def check_names(page: Page, daemon: Daemon) -> None:
    step("names are text, wherever they come from")
    expect(row(page, "artifact-table", f"{daemon.name}@1")).to_be_visible()
    errors = page.locator("#errors tbody tr").filter(has_text=daemon.missing.removesuffix("@1"))
    expect(errors.first).to_be_visible()
    assert page.evaluate("window.injected") is None
    assert page.evaluate("document.images.length") == 0
    assert page.evaluate("document.querySelectorAll('[onerror],[onload],svg:not(.bar svg)').length") == 0
    assert page.evaluate("document.scripts.length") == 1


def check_doctor(page: Page) -> None:
    step("the doctor runs on demand")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.get_by_role("button", name="Run the doctor now").click()
    expect(page.get_by_role("button", name="Run the doctor now")).to_be_enabled(timeout=60_000)
    assert [url for url in asked if url.endswith("/cache/doctor?max_age=0")], asked
    expect(page.locator("#doctor tbody tr").filter(has_text="directory").first).to_be_visible()


def check_everybody_can_read_it(page: Page) -> None:
    for scheme in ("light", "dark"):
        for width in (1200, 880, 320):
            step(f"{scheme}, {width} px: labels, contrast, no scrolling to the side")
            page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            page.set_viewport_size({"width": width, "height": 700})
            problems = page.evaluate(ACCESSIBILITY)
            assert not problems, "\n".join(problems)
            needed = page.evaluate("document.documentElement.scrollWidth")
            assert needed <= width, f"the page is {needed} px wide"


def check_pauses(page: Page, daemon: Daemon) -> None:
    step("a hidden tab sends no requests, and is up to date when it is shown again")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    show = """hidden => {
        Object.defineProperty(document, "hidden", { configurable: true, get: () => hidden });
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    page.evaluate(show, True)
    page.wait_for_timeout(1000)
    asked.clear()
    page.wait_for_timeout(5000)
    assert not asked, asked
    page.evaluate(show, False)
    expect(page.locator("#connection")).to_have_text("Updated every 2 seconds.")
    step("a daemon that does not answer is reported, asked less and less often, and found again")
    daemon.stop()
    expect(page.locator("#connection")).to_contain_text("does not answer", timeout=15_000)
    expect(page.locator("#connection")).to_contain_text("every 8 s", timeout=30_000)
    expect(artifact(page, "slow")).to_be_visible()
    daemon.start(urllib.parse.urlsplit(daemon.url).netloc)
    expect(page.locator("#connection")).to_have_text("Updated every 2 seconds.", timeout=30_000)


def run(browser, daemon: Daemon, screenshot: Path) -> None:
    check_routes(daemon)
    check_first_paint(browser, daemon)
    context = browser.new_context(http_credentials=credentials(), viewport={"width": 1000, "height": 1250})
    page = context.new_page()
    complaints: list[str] = []
    hosts: set[str] = set()
    page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: hosts.add(urllib.parse.urlsplit(request.url).netloc))
    page.goto(daemon.url)
    expect(page.locator("#connection")).to_have_text("Updated every 2 seconds.")
    check_fill_and_eviction(page, daemon, screenshot)
    check_list(page, daemon)
    check_names(page, daemon)
    check_doctor(page)
    check_everybody_can_read_it(page)
    step("nothing is loaded from another host, and the console is quiet")
    assert hosts == {urllib.parse.urlsplit(daemon.url).netloc}, hosts
    assert not complaints, complaints
    size = screenshot.stat().st_size
    assert size < 200_000, f"the screenshot has {size} bytes"
    check_pauses(page, daemon)
    context.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--chromium", "--modelcache", "--testkit"):
        parser.add_argument(name, required=True)
    parser.add_argument("--screenshot", type=Path, help="with harmless names, for the documentation")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="modelcache-page-"))
    daemon = None
    try:
        daemon = Daemon(arguments.modelcache, arguments.testkit, folder, HARMLESS if arguments.screenshot else HOSTILE)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=arguments.chromium, args=["--no-sandbox"])
            run(browser, daemon, arguments.screenshot or folder / "page.png")
            browser.close()
        print("the status page works", flush=True)
    finally:
        if daemon:
            daemon.close()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
