"""What the scripts beside this one measure in process, printed as one line of JSON."""

import http.client
import json
import os
import time
from urllib.parse import urlsplit


def calls(call, runs):
    """The same call again and again: microseconds at some percentiles, and core-microseconds a call."""
    times, clock = [], time.perf_counter_ns
    spent = time.process_time()
    for _ in range(runs):
        started = clock()
        call()
        times.append(clock() - started)
    spent = time.process_time() - spent
    times.sort()
    told = {f"p{share}_us": times[(runs - 1) * share // 100] / 1e3 for share in (10, 50, 90, 99)}
    print(json.dumps({**told, "core_us": spent * 1e6 / runs}))


def bytes_sent():
    """What the server of this bench has sent until now."""
    server = http.client.HTTPConnection(urlsplit(os.environ["AWS_ENDPOINT_URL"]).netloc)
    server.request("GET", "/?bench-stats")
    sent = json.load(server.getresponse())["bytes_sent"]
    server.close()
    return sent


def touch(size):
    """Touches as much memory once, and lets go of it.

    A virtual machine is given memory when it first touches it, which takes several times as long as a load, and more in
    one run than in the next. Touched, it is there; as numpy asks for it, in huge pages where there are such.
    """
    import numpy as np

    np.ones(size, np.uint8)


class Stopwatch:
    """Seconds, and core-seconds of all threads, since it was made."""

    def __init__(self):
        self._started, self._spent = time.perf_counter(), time.process_time()

    def seconds(self):
        return time.perf_counter() - self._started

    def core_seconds(self):
        return time.process_time() - self._spent
