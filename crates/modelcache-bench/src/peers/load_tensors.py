"""Loads all tensors of a safetensors file into memory as numpy arrays.

usage: load_tensors.py HOW SIZE FILE | HOW SIZE REFERENCE FILE   HOW: safe_open, load_file, runai, runai-packed

SIZE is the size of all tensors. With REFERENCE, modelcache is opened and returns the folder of FILE. Prints as JSON the
seconds and core-seconds until the last tensor is in memory. The start of Python and the imports are not included.
"""

import json
import os
import sys

import numpy as np

import measured
from safetensors_layout import read_tensors


def with_safe_open(path):
    with safe_open(path, "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def with_runai(path):
    """Lays the tensors out in memory like the Python API of the streamer.

    If the address and the file offset of a tensor differ by a multiple of the block size, the engine reads it with
    O_DIRECT.
    """
    engine = Engine()
    with open(path, "rb") as file:
        rows = read_tensors(file)
    block = 1 if how == "runai-packed" else engine.direct_block(path)
    memory = np.empty(sum(size for _, _, size in rows) + block * (len(rows) + 1), np.uint8)
    start = cursor = memory.ctypes.data
    places = []
    for _, at, size in rows:
        cursor += (at - cursor) % block
        places.append(cursor)
        cursor += size
    for _ in engine.read(path, [at for _, at, _ in rows], [size for _, _, size in rows], places):
        pass
    engine.end()
    views = (memory[place - start :][:size].view(np.float32) for place, (_, _, size) in zip(places, rows))
    return dict(zip((name for name, _, _ in rows), views))


def check(loaded, path):
    """Exits with an error unless every tensor is loaded, with the first and last value that it has in the file."""
    with open(path, "rb") as file:
        rows = read_tensors(file)
        for name, at, size in rows:
            array = loaded[name]
            ends = os.pread(file.fileno(), 4, at), os.pread(file.fileno(), 4, at + size - 4)
            if array.nbytes != size or (array[:1].tobytes(), array[-1:].tobytes()) != ends:
                sys.exit(f"{name} was not loaded correctly")
    if len(loaded) != len(rows):
        sys.exit(f"{len(loaded)} of {len(rows)} tensors were loaded")


how, size, *source = sys.argv[1:]
if how == "safe_open":
    from safetensors import safe_open

    load = with_safe_open
elif how == "load_file":
    from safetensors.numpy import load_file as load
else:
    from runai_engine import Engine

    load = with_runai
if len(source) == 2:
    from modelcache import ModelCache

measured.touch(int(size))
watch = measured.Stopwatch()
path = str(ModelCache().get(source[0]) / source[1]) if len(source) == 2 else source[0]
loaded = load(path)
figures = {"seconds": watch.seconds(), "core_seconds": watch.core_seconds()}
check(loaded, path)
print(json.dumps(figures))
