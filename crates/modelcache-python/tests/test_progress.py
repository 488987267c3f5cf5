"""``progress=True`` in notebooks, on terminals and in logs; progress bar classes in notebooks."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import nbclient
import nbformat
import pytest
from conftest import noise, write_model
from modelcache import ModelCache, UnavailableError, _progress
from servers import SlowProxy

SIZE = 2 << 20


@pytest.fixture
def published(slow: SlowProxy, tmp_path: Path) -> SlowProxy:
    """`m@1` and `n@1`, both on the remote only. Each takes about a second to download."""
    with ModelCache() as cache:
        cache.put("m", "1", write_model(tmp_path / "model", SIZE), tier="remote")
        cache.put("n", "1", noise(SIZE, 1), tier="remote")
    slow.bytes_per_second = 2_000_000
    return slow


PREPARE = """
import asyncio, concurrent.futures, os, sys
from modelcache import ModelCache, ModelCacheError, _progress
cache = ModelCache()
"""
BOTH_AT_ONCE = """
with concurrent.futures.ThreadPoolExecutor() as pool:
    list(pool.map(lambda name: cache.get(name, "1", progress=True), ["m", "n"]))
"""


def errors_of(code: str) -> str:
    """Run a program whose standard error is a pipe, and return what it writes there."""
    done = subprocess.run([sys.executable, "-c", PREPARE + code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    return done.stderr


def screen_of(code: str, **environment: str) -> str:
    """Run a program on a terminal of 80 columns, and return what it writes there."""
    terminal, child_end = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", PREPARE + code],
        stdin=subprocess.DEVNULL, stdout=child_end, stderr=child_end,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "80"} | environment,
    )  # fmt: skip
    os.close(child_end)
    written, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline and select.select([terminal], [], [], 60)[0]:
        try:
            written += os.read(terminal, 1 << 16)
        except OSError:  # All other ends are closed.
            break
    os.close(terminal)
    assert child.wait(10) == 0, written
    # The terminal writes a line end as two characters.
    return written.decode().replace("\r\n", "\n")


# -- logs and pipes ----------------------------------------------------------------------------------------------------


def test_a_log_gets_lines_at_a_bounded_rate_and_nothing_for_a_cached_artifact(published: SlowProxy) -> None:
    *lines, last = errors_of("""
_progress._LINE_SECONDS = 0.4
cache.get("m", "1", progress=True)
cache.get("m", "1", progress=True)
cache.get("n", "1", progress=False)
""").splitlines()
    done = re.fullmatch(r"m@1: done, 2.1 MB in (.*) s", last)
    assert done and 2 <= len(lines) <= 1 + float(done[1]) / 0.4
    assert all(line.startswith("m@1: ") for line in lines)
    assert re.search(r"m@1: downloading, \d+%, .* of 2.1 MB, .*B/s, \d+ s left", "\n".join(lines))


def test_a_failed_and_a_cancelled_call_say_so(published: SlowProxy) -> None:
    published.let_through(SIZE)  # Half of both.
    lines = errors_of("""
_progress._LINE_SECONDS = 100
async def main():
    failing = cache.aget("m", "1", progress=True, timeout=3)
    cancelled = asyncio.wait_for(cache.aget("n", "1", progress=True), 3)
    print(len(await asyncio.gather(failing, cancelled, return_exceptions=True)), file=sys.stderr)
asyncio.run(main())
""").splitlines()
    assert lines[4:] == ["2"]
    assert sorted(re.sub(r"[\d.]+ s,.*", "", line) for line in lines[2:4]) == [
        "m@1: failed after ",
        "n@1: cancelled after ",
    ]


def test_put_prewarm_and_verify_show_progress(slow: SlowProxy, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", SIZE)
    slow.bytes_per_second = 2000  # Of the answers, so that the upload takes longer than an interval of reports.
    put = f'cache.put("m", "1", {str(model)!r}, tier="remote", progress=True)'
    lines = errors_of(f"_progress._LINE_SECONDS = 0\n{put}").splitlines()
    assert any(line.startswith("m@1: uploading, ") for line in lines)
    assert lines[-1].startswith("m@1: done, 2.1 MB in ")
    slow.bytes_per_second = None
    lines = errors_of('cache.prewarm(["m@1"], progress=True)\ncache.verify(progress=True)').splitlines()
    ends = [line.partition(" in ")[0] for line in lines if ": done" in line]
    assert ends == ["prewarm: done, 2.1 MB", "verify: done, 2.1 MB"]


# -- terminals ---------------------------------------------------------------------------------------------------------


def test_a_terminal_shows_one_line_that_is_overwritten(published: SlowProxy) -> None:
    screen = screen_of('cache.get("m", "1", progress=True)\ncache.get("m", "1", progress=True)')
    assert screen.count("\n") == 1 and screen.endswith("\x1b[K\n")
    *drawn, last = screen.rstrip("\n").removeprefix("\r").split("\r")
    assert len(drawn) >= 3
    assert all(line.startswith("m@1: ") and len(line) < 80 + len("\x1b[K") for line in drawn)
    assert last.startswith("m@1: done, 2.1 MB in ")


def test_calls_of_two_threads_share_the_line(published: SlowProxy) -> None:
    screen = screen_of(BOTH_AT_ONCE, COLUMNS="300")
    assert screen.count("\n") == 2 and screen.count(": done, 2.1 MB in ") == 2
    assert any("m@1: " in line and " | " in line and "n@1: " in line for line in screen.split("\r"))


def test_a_terminal_that_cannot_redraw_gets_lines(published: SlowProxy) -> None:
    screen = screen_of('cache.get("m", "1", progress=True)', TERM="dumb")
    assert "\r" not in screen and screen.count("\n") == 2


def test_a_forked_child_shows_its_own_calls_only(published: SlowProxy) -> None:
    screen = screen_of("""
cache.get("m", "1", progress=True)
_progress._TerminalLine().draw(0.5, "a call of a thread of the parent")
if os.fork():
    os.wait()
else:
    cache.get("n", "1", progress=True)
    os._exit(0)
""")
    assert " | " not in screen
    assert screen.rstrip().rsplit("\r", 1)[1].startswith("n@1: done, 2.1 MB in ")


# -- errors of the display ---------------------------------------------------------------------------------------------


def test_an_error_of_the_display_is_logged_once_and_ends_no_call(
    published: SlowProxy, open_cache: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> _progress._Output:
        raise LookupError("no place to draw")

    monkeypatch.setattr(_progress, "_output", broken)
    monkeypatch.setattr(_progress, "_warnings", set())
    cache = open_cache()
    with caplog.at_level(logging.WARNING, "modelcache"):
        assert cache.get("m", "1", progress=True).exists()
        assert asyncio.run(cache.aget("n", "1", progress=True)).exists()
    assert [record.message for record in caplog.records] == [
        "the progress cannot be displayed, and the call continues without: LookupError('no place to draw')"
    ]


@pytest.mark.parametrize("stream", ["None", "open(os.devnull)", "os.fdopen(os.dup(2), 'w')"])
def test_a_program_without_a_usable_standard_error_downloads(published: SlowProxy, stream: str) -> None:
    errors_of(f"""
sys.stderr = {stream}
if sys.stderr is not None:
    sys.stderr.close()
assert cache.get("m", "1", progress=True).exists()
""")


# -- texts -------------------------------------------------------------------------------------------------------------


class _Recorder:
    """An output that keeps what it is told."""

    def __init__(self) -> None:
        self.drawn: list[tuple[float, str]] = []

    def draw(self, fraction: float, text: str) -> None:
        self.drawn.append((fraction, text))

    def close(self, fraction: float, text: str, is_success: bool) -> None:
        self.drawn.append((fraction, text))


Snapshot = tuple[str, int, int, int, int, int, str | None]


@pytest.fixture
def texts_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[tuple[float, str]]]]:
    """A function that displays snapshots, one each second, and returns what is drawn."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def show(snapshots: list[Snapshot], label: str = "m@1") -> list[tuple[float, str]]:
        nonlocal now
        recorder, call = _Recorder(), cast(Any, SimpleNamespace())
        monkeypatch.setattr(_progress, "_output", lambda: recorder)
        with _progress.reporter(call, True, label) as reporting:
            for snapshot in snapshots:
                call.snapshot = lambda snapshot=snapshot: snapshot
                reporting.report()
                now += 1
        return recorder.drawn

    yield show


def test_rate_and_time_left_are_those_of_the_phase(texts_of: Any) -> None:
    assert texts_of(
        [
            ("download", 100_000_000, 500_000_000, 0, 0, 0, None),
            ("download", 200_000_000, 500_000_000, 0, 0, 1, "503"),
            ("backfill", 0, 500_000_000, 0, 0, 0, None),
            ("backfill", 500_000_001, 500_000_000, 0, 0, 0, None),
        ]
    ) == [
        (0.2, "m@1: downloading, 20%, 100 MB of 500 MB"),
        (0.4, "m@1: downloading, 40%, 200 MB of 500 MB, a request failed and is sent again, 100 MB/s, 3 s left"),
        (0.0, "m@1: uploading, 0%, 0 B of 500 MB"),
        (1.0, "m@1: uploading, 100%, 500 MB of 500 MB, 500 MB/s, 0 s left"),
        (1.0, "m@1: done, 500 MB in 4.0 s"),
    ]


def test_an_unknown_size_shows_the_bytes_received(texts_of: Any) -> None:
    assert texts_of([("plan", 0, 0, 0, 1_500, 0, None)]) == [
        (0.0, "m@1: planning, 1.5 kB"),
        (1.0, "m@1: done, 1.5 kB in 1.0 s"),
    ]


def test_a_call_without_bytes_is_shown_after_a_second(texts_of: Any) -> None:
    waiting: Snapshot = ("join", 0, 0, 0, 0, 0, None)
    assert texts_of([waiting]) == []
    assert texts_of([waiting, waiting]) == [
        (0.0, "m@1: waiting for another download"),
        (1.0, "m@1: done, 2.0 s"),
    ]


def test_control_characters_of_a_reference_are_escaped(texts_of: Any) -> None:
    drawn = texts_of([("download", 1, 2, 0, 0, 0, None)], "a\x1b[2J\nb")
    assert drawn[0][1].startswith("a\\x1b[2J\\nb: ")


def test_a_bar_class_is_reset_for_each_phase_and_ends_full() -> None:
    made: list[Bar] = []

    class Bar:
        def __init__(self, **arguments: Any) -> None:
            self.arguments, self.total, self.n, self.events = arguments, arguments["total"], 0.0, [""]
            made.append(self)

        def update(self) -> None: ...

        def reset(self, total: float | None = None) -> None:
            self.total = total
            self.events.append(f"reset to {total}")

        def refresh(self) -> None:
            self.events.append(f"{self.n} of {self.total}")

        def close(self) -> None:
            self.events.append("closed")

    call = cast(Any, SimpleNamespace())
    with _progress.reporter(call, functools.partial(Bar, colour="red"), "m@1") as reporting:
        for phase, done, total in (("plan", 0, 0), ("download", 10, 20), ("backfill", 5, 30)):
            call.snapshot = lambda now=(phase, done, total, 0, 0, 0, None): now
            reporting.report()
    [bar] = made
    assert bar.arguments == {"total": 20, "desc": "m@1", "unit": "B", "unit_scale": True, "colour": "red"}
    assert bar.events[1:] == ["10 of 20", "reset to 30", "5 of 30", "30 of 30", "closed"]


# -- notebooks ---------------------------------------------------------------------------------------------------------


def run_notebook(*cells: str) -> Any:
    """Execute a notebook in a kernel of its own, and return it with its outputs."""
    v4: Any = nbformat.v4
    notebook = v4.new_notebook(cells=[v4.new_code_cell(code) for code in (PREPARE, *cells)])
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    return notebook


def widgets_of(notebook: Any, cell: int) -> list[list[dict[str, Any]]]:
    """Return the final states of the widgets in the boxes that a cell displays."""
    state = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
    view = "application/vnd.jupyter.widget-view+json"
    outputs = notebook.cells[cell].outputs
    assert all(output.output_type == "display_data" for output in outputs), outputs
    boxes = [state[output.data[view]["model_id"]]["state"] for output in outputs]
    return [[state[child.removeprefix("IPY_MODEL_")]["state"] for child in box["children"]] for box in boxes]


def test_a_notebook_shows_a_bar_for_each_download(published: SlowProxy) -> None:
    notebook = run_notebook(
        'first = cache.get("m", "1", progress=True)',
        'again = cache.get("m", "1", progress=True)',
        'cache.evict("m", "1", tier="disk");',
        BOTH_AT_ONCE,
        'cache.evict("m", "1", tier="disk"); cache.evict("n", "1", tier="disk");',
        'task = asyncio.create_task(cache.aget("m", "1", progress=True)); await cache.aget("n", "1", progress=True)\n'
        "await task;",
    )
    [[bar, text]] = widgets_of(notebook, 1)
    assert (bar["value"], bar["max"], bar["bar_style"]) == (1.0, 1.0, "success")
    assert text["value"].startswith("m@1: done, 2.1 MB in ")
    assert notebook.cells[2].outputs == [], "the artifact is on disk"
    for cell in (4, 6):
        widgets = widgets_of(notebook, cell)
        assert sorted(text["value"][:9] for _, text in widgets) == ["m@1: done", "n@1: done"]
        assert all((bar["value"], bar["bar_style"]) == (1.0, "success") for bar, _ in widgets)


def test_a_failed_and_an_interrupted_call_mark_their_bars(published: SlowProxy) -> None:
    published.let_through(SIZE)  # Half of both.
    notebook = run_notebook(
        "import ipywidgets, signal, threading",  # The first import takes a while.
        'try:\n    cache.get("m", "1", progress=True, timeout=2)\nexcept ModelCacheError:\n    pass',
        "threading.Timer(2, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        'try:\n    cache.get("n", "1", progress=True)\nexcept KeyboardInterrupt:\n    pass',
    )
    for cell, outcome in ((2, "m@1: failed after "), (3, "n@1: cancelled after ")):
        [[bar, text]] = widgets_of(notebook, cell)
        assert bar["bar_style"] == "danger" and bar["value"] < 1
        assert text["value"].startswith(outcome)


def test_a_notebook_without_ipywidgets_shows_a_text_that_is_updated(published: SlowProxy) -> None:
    notebook = run_notebook(
        'sys.modules["ipywidgets"] = None',
        'cache.get("m", "1", progress=True);',
        "child = os.fork()\n"
        'if child == 0:\n    cache.get("n", "1", progress=True)\n    os._exit(0)\n'
        "assert os.waitpid(child, 0)[1] == 0",
    )
    [output] = notebook.cells[2].outputs
    assert output.output_type == "display_data"
    assert output.data["text/plain"].startswith("m@1: done, 2.1 MB in ")
    assert list(output.data) == ["text/plain"]
    assert all(output.output_type == "stream" for output in notebook.cells[3].outputs), "a child displays no widgets"


def test_a_tqdm_bar_in_a_notebook_has_the_size_of_the_download(published: SlowProxy) -> None:
    notebook = run_notebook(
        "from tqdm.notebook import tqdm",
        'cache.get("m", "1", progress=tqdm)\ncache.get("m", "1", progress=tqdm);',
    )
    [[_, bar, _]] = widgets_of(notebook, 2)
    assert bar["value"] == bar["max"] >= SIZE and bar["bar_style"] == "success"


# -- huggingface_hub ---------------------------------------------------------------------------------------------------


DOWNLOAD = 'from modelcache import hf\nhf.snapshot_download("org/model")'


def test_a_snapshot_download_writes_no_lines_to_a_log(hub: Path) -> None:
    assert errors_of(DOWNLOAD) == ""


def test_a_snapshot_download_on_a_terminal_shows_progress_unless_it_is_switched_off(hub: Path) -> None:
    off = "from huggingface_hub.utils import disable_progress_bars\ndisable_progress_bars()\n"
    assert screen_of(DOWNLOAD, HF_HUB_DISABLE_PROGRESS_BARS="1", MODEL_CACHE_DIR=f"{hub}-1") == ""
    assert screen_of(off + DOWNLOAD, MODEL_CACHE_DIR=f"{hub}-2") == ""
    assert "hf://org/model@main: done, " in screen_of(DOWNLOAD)
