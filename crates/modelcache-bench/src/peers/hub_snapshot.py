"""huggingface_hub: downloads one repo by snapshot_download.   usage: hub_snapshot.py REPO FOLDER [WORKERS]"""

import sys

from huggingface_hub import snapshot_download

options = {"max_workers": int(sys.argv[3])} if len(sys.argv) > 3 else {}
snapshot_download(sys.argv[1], cache_dir=sys.argv[2], **options)
