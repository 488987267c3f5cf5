"""Run:ai Model Streamer: loads one S3 object into memory, in ranges of 64 MiB, with its engine alone.

usage: runai_load.py URL SIZE [CONCURRENCY]
"""

import ctypes
import mmap
import os
import sys

url, size = sys.argv[1], int(sys.argv[2])
if len(sys.argv) > 3:
    os.environ["RUNAI_STREAMER_CONCURRENCY"] = sys.argv[3]
from runai_engine import Engine

memory = mmap.mmap(-1, size)
base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
step = 64 * 1024 * 1024
offsets = list(range(0, size, step))
sizes = [min(step, size - at) for at in offsets]
engine = Engine()
for _ in engine.read(url, offsets, sizes, [base + at for at in offsets]):
    pass
engine.end()
