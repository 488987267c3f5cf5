"""modelcache: measures a get of an artifact that is on disk, in process.

usage: modelcache_warm.py RUNS REFERENCE | RUNS NAME VERSION
"""

import sys

from modelcache import ModelCache

import measured

runs, wanted = int(sys.argv[1]), sys.argv[2:]
cache = ModelCache()
if len(wanted) == 2:
    name, version = wanted
    measured.calls(lambda: cache.get(name, version), runs)
else:
    reference = wanted[0]
    measured.calls(lambda: cache.get(reference), runs)
