"""In-process measurements for the scripts in this folder, printed as one line of JSON."""

import http.client
import json
import os
import time
from urllib.parse import urlsplit


def calls(call, runs):
    """Repeats a call. Prints percentiles of its duration in microseconds, and its mean processor time."""
    times, clock = [], time.perf_counter_ns
    core_started = time.process_time()
    for _ in range(runs):
        started = clock()
        call()
        times.append(clock() - started)
    core_seconds = time.process_time() - core_started
    times.sort()
    figures = {f"p{percent}_us": times[(runs - 1) * percent // 100] / 1e3 for percent in (10, 50, 90, 99)}
    print(json.dumps({**figures, "core_us": core_seconds * 1e6 / runs}))


def bytes_sent():
    """Returns the bytes that the bench server has sent so far."""
    server = http.client.HTTPConnection(urlsplit(os.environ["AWS_ENDPOINT_URL"]).netloc)
    server.request("GET", "/?bench-stats")
    sent = json.load(server.getresponse())["bytes_sent"]
    server.close()
    return sent


def touch(size):
    """Touches this much memory once and frees it.

    A virtual machine gets memory from its host when it first touches it. That takes several times as long as a load and
    varies from run to run. Memory that was touched before is already backed. numpy allocates it as it will later, in
    huge pages where these are available.
    """
    import numpy as np

    np.ones(size, np.uint8)


class Stopwatch:
    """Seconds, and core-seconds of all threads, since its creation."""

    def __init__(self):
        self._started, self._spent = time.perf_counter(), time.process_time()

    def seconds(self):
        return time.perf_counter() - self._started

    def core_seconds(self):
        return time.process_time() - self._spent
