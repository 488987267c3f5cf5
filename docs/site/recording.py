"""Records a session in a terminal as an animated SVG without scripts: `cargo xtask site --recording FILE`.

The programs are real. A shell runs them in a pseudo-terminal, with a stand-in for the Hugging Face Hub, which is slow
so that the progress bar is visible. The emulator pyte reads what they print. Each row of the screen becomes a `<text>`
that is visible from one time to another. Viewers without animation, or that prefer reduced motion, show the last frame.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import random
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from xml.sax.saxutils import escape

import pyte

COMMANDS = [
    "modelcache get hf://acme/tiny",
    "modelcache get hf://acme/tiny",
    "modelcache ls",
    "modelcache exec hf://acme/tiny -- python -c 'import sys; print(*open(sys.argv[1]))' {}/config.json",
    "modelcache stats",
]
TITLE = "modelcache in a terminal: download a model, use it from disk"
# Shown in place of the temporary home.
HOME = "/home/u"
MODEL_BYTES = 64_000_000
COLUMNS, ROWS = 100, 27
TIMEOUT_S = 60

# Bytes per second of each connection to the stand-in.
RATE = 700_000
KEY_S, PAUSE_S, END_S = 0.045, 1.2, 5.0
FRAME_S = 0.1

# In pixels.
CELL_WIDTH, LINE_HEIGHT, FONT_SIZE, MARGIN = 8.4, 18, 14, 16
COLOURS = {"red": "#ff7b72", "green": "#7ee787", "brown": "#e3b341", "blue": "#79c0ff", "cyan": "#76e3ea"}

# The runs of a row: text and class.
Row = tuple[tuple[str, str], ...]


class Terminal:
    """A shell in a pseudo-terminal. `frames` has the screen after each change, with its time."""

    def __init__(self, environment: dict[str, str], home: Path) -> None:
        self._screen = pyte.Screen(COLUMNS, ROWS)
        self._stream = pyte.ByteStream(self._screen)
        self._home = str(home).encode()
        self._start = time.monotonic()
        self.frames: list[tuple[float, list[Row]]] = []
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            os.chdir(home)
            os.execvpe("bash", ["bash", "--noprofile", "--norc"], environment)
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("4H", ROWS, COLUMNS, 0, 0))
        self._wait_for_prompt("the shell")

    def run(self, command: str, key_s: float) -> None:
        """Type a command, and wait until it ends. It must succeed."""
        for key in command:
            self._send(key)
            self._read(key_s)
        self._send("\r")
        self._wait_for_prompt(command)

    def pause(self, seconds: float) -> None:
        self._read(seconds)

    def close(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._fd)

    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self._screen.display).rstrip()

    def _send(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def _wait_for_prompt(self, command: str) -> None:
        """Wait for the title of the window, to which the prompt sets the exit code."""
        self._screen.title = ""
        deadline = time.monotonic() + TIMEOUT_S
        while not self._screen.title:
            assert time.monotonic() < deadline, f"{command} did not end:\n{self.text()}"
            self._read(0.01)
        assert self._screen.title == "0", f"{command} ended with {self._screen.title}:\n{self.text()}"

    def _read(self, seconds: float) -> None:
        """Read for this time what the terminal prints."""
        end = time.monotonic() + seconds
        while select.select([self._fd], [], [], max(0.0, end - time.monotonic()))[0]:
            self._stream.feed(os.read(self._fd, 65536).replace(self._home, HOME.encode()))
            self.frames.append((time.monotonic() - self._start, list(self._rows())))

    def _rows(self) -> Iterator[Row]:
        for y in range(ROWS):
            cells = [self._screen.buffer[y][x] for x in range(COLUMNS)]
            runs = groupby(cells, lambda cell: " ".join(["bold"] * cell.bold + [cell.fg] * (cell.fg in COLOURS)))
            row = [("".join(cell.data for cell in run), style) for style, run in runs]
            while row and not row[-1][0].strip():
                row.pop()
            if row:
                row[-1] = (row[-1][0].rstrip(), row[-1][1])
            yield tuple(row)


def record(programs: Path, fast: bool) -> str:
    """Run the commands, and return the SVG. `fast` omits the pauses, and the stand-in is not slow."""
    with tempfile.TemporaryDirectory() as folder:
        home, model = Path(folder, "home"), Path(folder, "models/acme/tiny")
        home.mkdir()
        model.mkdir(parents=True)
        (model / "config.json").write_text('{"layers": 2}')
        (model / "model.safetensors").write_bytes(random.Random(0).randbytes(MODEL_BYTES))
        rate = [] if fast else ["--rate", str(RATE)]
        hub = [programs / "testkit", "hub", "--folder", model.parents[1], *rate]
        with subprocess.Popen(hub, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout
            address = next(line for line in server.stdout if line.startswith("export HF_ENDPOINT="))
            environment = {
                "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
                "HOME": str(home),
                "HF_ENDPOINT": address.strip().partition("=")[2],
                "LANG": "C.UTF-8",
                "TERM": "xterm-256color",
                "MODEL_CACHE_MAX_BYTES": "100GB",
                "MODEL_CACHE_MIN_FREE_BYTES": "1GB",
                "PS1": r"\[\e[32m\]$\[\e[0m\] ",
                "PROMPT_COMMAND": r'printf "\e]2;%s\a" $?',
            }
            terminal = Terminal(environment, home)
            try:
                for command in COMMANDS:
                    terminal.run(command, 0 if fast else KEY_S)
                    terminal.pause(0 if fast else PAUSE_S)
                terminal.pause(0.1)
                text = terminal.text()
            finally:
                terminal.close()
                server.kill()
        image = svg(terminal.frames, text)
        assert folder not in image, "the recording shows the temporary folder"
        return image


def svg(frames: list[tuple[float, list[Row]]], text: str) -> str:
    """Draw the frames. `text` is the last one in words."""
    start, total = frames[0][0], frames[-1][0] - frames[0][0] + END_S
    # Each row of the screen, with the times between which it is visible. Rows of the last frame have no end.
    visible: dict[tuple[float, float | None], list[tuple[int, Row]]] = {}
    frames = [(at - start, rows) for at, rows in thinned(frames)]
    for y in range(ROWS):
        changes = [next(group) for _, group in groupby(frames, lambda frame: frame[1][y])]
        for (at, rows), following in zip(changes, [*changes[1:], None]):
            if rows[y]:
                visible.setdefault((at, following and following[0]), []).append((y, rows[y]))

    def percent(seconds: float) -> str:
        return f"{100 * seconds / total:.2f}%"

    moves, texts = [], []
    for number, ((at, until), rows) in enumerate(sorted(visible.items(), key=lambda item: item[0][0])):
        hidden = "" if until is None else f"{percent(until)}{{visibility:hidden}}"
        moves.append(f"@keyframes k{number}{{0%{{visibility:hidden}}{percent(at)}{{visibility:visible}}{hidden}}}")
        style = f"animation-name:k{number}" + ("" if until is None else ";visibility:hidden")
        texts.append(f'<g style="{style}">' + "".join(drawn(y, row) for y, row in rows) + "</g>")
    width, height = round(COLUMNS * CELL_WIDTH + 2 * MARGIN), ROWS * LINE_HEIGHT + 2 * MARGIN
    colours = "".join(f".{name}{{fill:{colour}}}" for name, colour in COLOURS.items())
    newline = "\n"
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-labelledby="title desc">
<title id="title">{TITLE}</title>
<desc id="desc">{escape(text)}</desc>
<style>
text{{font:{FONT_SIZE}px ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;fill:#e6edf3;white-space:pre}}
{colours}.bold{{font-weight:bold}}
@media (prefers-reduced-motion:no-preference){{g{{animation:{total:.2f}s step-end infinite}}}}
{newline.join(moves)}
</style>
<rect width="{width}" height="{height}" rx="8" fill="#161b22"/>
{newline.join(texts)}
</svg>
"""


def thinned(frames: list[tuple[float, list[Row]]]) -> list[tuple[float, list[Row]]]:
    """Keep the last of the frames within each interval of `FRAME_S`."""
    return [list(group)[-1] for _, group in groupby(frames, lambda frame: int(frame[0] / FRAME_S))]


def drawn(y: int, row: Row) -> str:
    """Draw a row. `textLength` keeps the columns, whatever the font of the viewer."""
    columns = sum(len(text) for text, _ in row)
    spans = "".join(f'<tspan class="{style}">{escape(text)}</tspan>' if style else escape(text) for text, style in row)
    place = f'x="{MARGIN}" y="{MARGIN + y * LINE_HEIGHT + FONT_SIZE}" textLength="{columns * CELL_WIDTH:.1f}"'
    return f'<text {place} lengthAdjust="spacingAndGlyphs">{spans}</text>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=Path, required=True, help="the folder of modelcache and testkit")
    parser.add_argument("--fast", action="store_true", help="omit the pauses; for tests")
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    arguments.output.write_text(record(arguments.programs.resolve(), arguments.fast))


if __name__ == "__main__":
    main()
