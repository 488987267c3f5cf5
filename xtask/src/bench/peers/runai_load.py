"""Run:ai Model Streamer: one S3 object into memory, by its engine alone.

usage: runai_load.py URL SIZE [CONCURRENCY]

The package's face is imported with torch, 5 GB to install and seconds to start; neither is needed to move bytes, so
the engine beneath it is called as the face does: one request of 64 MiB ranges into one buffer.
"""

import ctypes
import importlib.util
import mmap
import os
import sys
import types

url, size = sys.argv[1], int(sys.argv[2])
if len(sys.argv) > 3:
    os.environ["RUNAI_STREAMER_CONCURRENCY"] = sys.argv[3]
os.environ.setdefault("RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING", "0")

folder = importlib.util.find_spec("runai_model_streamer").submodule_search_locations
package = types.ModuleType("runai_model_streamer")
package.__path__ = list(folder)
sys.modules["runai_model_streamer"] = package
from runai_model_streamer.libstreamer.libstreamer import runai_end, runai_request, runai_response, runai_start

memory = mmap.mmap(-1, size)
base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
step = 64 * 1024 * 1024
offsets = list(range(0, size, step))
sizes = [min(step, size - at) for at in offsets]
streamer = runai_start()
runai_request(streamer, [url], [len(offsets)], offsets, sizes, [base + at for at in offsets])
for _ in offsets:
    code = runai_response(streamer)[0]
    if code:
        sys.exit(f"the streamer answered {code}")
runai_end(streamer)
