"""The command ``modelcache`` of the package: the command line, with its exit codes, signals and output."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import modelcache
import pytest
from conftest import write_model
from modelcache import ModelCache
from servers import SlowProxy

SCRIPT = [str(Path(sys.executable).with_name("modelcache"))]
MODULE = [sys.executable, "-m", "modelcache"]


def run(program: list[str], *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*program, *arguments], capture_output=True, text=True, timeout=60, **options)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", 1000)


@pytest.mark.parametrize("program", [SCRIPT, MODULE], ids=["script", "module"])
def test_the_command_is_that_of_the_binary(program: list[str], model: Path) -> None:
    assert run(program, "--version").stdout == f"modelcache {modelcache.__version__}\n"
    assert "Usage: modelcache get [OPTIONS]" in run(program, "get", "--help").stdout
    put = run(program, "put", "m@1", str(model), "--json")
    assert (put.returncode, json.loads(put.stdout)["files"]) == (0, 3)
    got = run(program, "get", "m@1")
    with ModelCache() as cache:
        assert (got.returncode, got.stdout) == (0, f"{cache.get('m', '1')}\n")


@pytest.mark.parametrize(
    ("arguments", "code", "message_part"),
    [
        (["nonsense"], 2, "unrecognized subcommand"),
        (["get", "m"], 2, "hint: "),
        (["get", "absent@1"], 3, "error: absent@1: "),
        (["exec", "m@1", "--", "sh", "-c", "exit 9"], 9, "m@1"),
        (["exec", "m@1", "--", "/no/such/program"], 127, "command not found"),
    ],
)
def test_exit_codes_and_errors_are_those_of_the_binary(
    arguments: list[str], code: int, message_part: str, model: Path
) -> None:
    with ModelCache() as cache:
        cache.put("m", "1", model)
    done = run(SCRIPT, *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert message_part in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("number", "code", "message_part"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_ends_the_command(
    number: signal.Signals, code: int, message_part: str, slow: SlowProxy, model: Path
) -> None:
    with ModelCache() as cache:
        cache.put("m", "1", model, tier="remote")
    slow.bytes_per_second = 1
    with subprocess.Popen([*SCRIPT, "get", "m@1"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "m@1" in process.stderr.readline(), "the first line of progress"
        process.send_signal(number)
        rest = process.stderr.read()
    assert (process.returncode, f"modelcache: {message_part}; " in rest) == (code, True), rest


def test_a_program_that_exec_starts_has_the_default_signals(model: Path) -> None:
    with ModelCache() as cache:
        cache.put("m", "1", model)
    ignored = ["grep", "SigIgn", "/proc/self/status"]
    # The tests run with Python's own settings, which `restore_signals` undoes for their children.
    assert run(SCRIPT, "exec", "m@1", "--", *ignored).stdout == run(ignored).stdout


def test_logs_go_to_standard_error_at_the_level_of_the_command_line() -> None:
    env = {**os.environ, "MODEL_CACHE_NONSENSE": "1"}
    assert " WARN " in run(SCRIPT, "ls", env=env).stderr
    assert " WARN " not in run(SCRIPT, "ls", env={**env, "MODEL_CACHE_LOG": "error"}).stderr


def test_the_command_runs_in_little_address_space(tmp_path: Path) -> None:
    # More than the few megabytes that the command makes durable by itself.
    write_model(tmp_path / "origin" / "m" / "1", 6 << 20)
    env = {**os.environ, "MODEL_CACHE_ORIGIN": f"file://{tmp_path}/origin/{{name}}/{{version}}"}

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))

    arenas = ["sh", "-c", "tr '\\0' '\\n' < /proc/$PPID/environ"]
    for program in (SCRIPT, MODULE):
        done = run(program, "get", "m@1", env=env, preexec_fn=limit)
        assert done.returncode == 0, done.stderr
    done = run(SCRIPT, "exec", "m@1", "--", *arenas, env=env, preexec_fn=limit)
    assert (done.returncode, "_MODELCACHE_ONE_ARENA" in done.stdout) == (0, False)
