"""Our package: one artifact to disk, which is what the command `get` does.   usage: modelcache_get.py REFERENCE"""

import sys

from modelcache import ModelCache

print(ModelCache().get(sys.argv[1]))
