"""Loads a safetensors file from S3 and measures the time until its first and its last tensor are in memory.

usage: first_tensor.py SIZE open REFERENCE FILE | SIZE get REFERENCE FILE | SIZE runai URL

SIZE is the size of all tensors. Prints as JSON the seconds until the first and the last tensor are in memory, the bytes
that the server had sent by the first tensor, and core-seconds. The start of Python and the imports are not included.
"""

import json
import sys

import numpy as np

import measured
from safetensors_layout import LENGTH_BYTES, header_length, read_tensors, tensors


def with_open(reference, path):
    """modelcache, reading the file while it is downloaded."""
    with ModelCache() as cache, cache.open(reference, path) as file:
        for _, at, size in read_tensors(file):
            file.seek(at)
            yield np.frombuffer(file.read(size), np.float32)


def with_get(reference, path):
    """modelcache, reading the file after the download."""
    with ModelCache() as cache, safe_open(cache.get(reference) / path, "numpy") as file:
        for name in file.keys():
            yield file.get_tensor(name)


def with_runai(url):
    """The Run:ai streamer, into memory. Its first tensor is the first one that arrives."""
    engine = Engine()

    def read(at, size):
        memory = np.empty(size, np.uint8)
        list(engine.read(url, [at], [size], [memory.ctypes.data]))
        return memory.tobytes()

    rows = tensors(read(LENGTH_BYTES, header_length(read(0, LENGTH_BYTES))))
    memory = np.empty(rows[-1][1] + rows[-1][2], np.uint8)
    places = [memory.ctypes.data + at for _, at, _ in rows]
    for number in engine.read(url, [at for _, at, _ in rows], [size for _, _, size in rows], places):
        _, at, size = rows[number]
        yield memory[at:][:size].view(np.float32)
    engine.end()


size, how, *source = sys.argv[1:]
if how == "runai":
    from runai_engine import Engine

    load = with_runai
else:
    from modelcache import ModelCache
    from safetensors import safe_open

    load = with_open if how == "open" else with_get

measured.touch(int(size))
watch = measured.Stopwatch()
tensors_in_order = load(*source)
loaded = [next(tensors_in_order)]
figures = {"first_s": watch.seconds(), "first_sent": measured.bytes_sent()}
for tensor in tensors_in_order:
    loaded.append(tensor)
    # After every tensor, because the generator closes the cache after the last one, which is not part of loading.
    figures.update(whole_s=watch.seconds(), core_seconds=watch.core_seconds())
print(json.dumps({**figures, "bytes": sum(tensor.nbytes for tensor in loaded)}))
