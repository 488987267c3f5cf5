"""The engine of the Run:ai Model Streamer without its Python API, which imports torch: 5 GB to install and seconds to
start.

The engine needs neither. It is called as the API calls it: it reads ranges of a file or an S3 object into memory and
reports each range that has arrived.
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
    """One streamer. The memory that `read` writes to must live until `end`."""

    def __init__(self):
        self._streamer = runai_start()

    def direct_block(self, path):
        """Returns the block size. A range is read with O_DIRECT if offset and address differ by a multiple of it."""
        return runai_probe_direct_block_size(self._streamer, [path])

    def read(self, path, offsets, sizes, addresses):
        """Requests all ranges at once, and yields the number of each range when it has arrived."""
        runai_request(self._streamer, [path], [len(offsets)], offsets, sizes, addresses)
        for _ in offsets:
            code, _, _, number, _ = runai_response(self._streamer)
            if code:
                sys.exit(f"the streamer failed with code {code}")
            yield number

    def end(self):
        runai_end(self._streamer)
