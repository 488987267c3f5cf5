"""modelcache: gets one artifact to disk, like the command `get`.   usage: modelcache_get.py REFERENCE"""

import sys

from modelcache import ModelCache

print(ModelCache().get(sys.argv[1]))
