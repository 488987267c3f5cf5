"""Run:ai Model Streamer without its face, which is imported with torch: 5 GB to install and seconds to start.

Neither is needed to move bytes: the engine beneath is called as the face does, ranges of a file or an S3 object into
memory, one answer a range.
"""

import importlib.util
import os
import sys
import types

os.environ.setdefault("RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING", "0")
folder = importlib.util.find_spec("runai_model_streamer").submodule_search_locations
package = types.ModuleType("runai_model_streamer")
package.__path__ = list(folder)
sys.modules["runai_model_streamer"] = package
from runai_model_streamer.libstreamer.libstreamer import (
    runai_end,
    runai_probe_direct_block_size,
    runai_request,
    runai_response,
    runai_start,
)


class Engine:
    """One streamer. What its ranges go to must live until it is ended."""

    def __init__(self):
        self._streamer = runai_start()

    def direct_block(self, path):
        """Where range and memory differ by a multiple of this, a file is read past the page cache."""
        return runai_probe_direct_block_size(self._streamer, [path])

    def read(self, path, offsets, sizes, addresses):
        """Asks for all ranges at once, and gives the number of each as it has come."""
        runai_request(self._streamer, [path], [len(offsets)], offsets, sizes, addresses)
        for _ in offsets:
            code, _, _, number, _ = runai_response(self._streamer)
            if code:
                sys.exit(f"the streamer answered {code}")
            yield number

    def end(self):
        runai_end(self._streamer)
