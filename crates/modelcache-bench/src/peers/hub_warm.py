"""huggingface_hub: measures hf_hub_download of a cached file, in process.

usage: hub_warm.py REPO FILE FOLDER RUNS

If RUNS is 0, the file is downloaded into the cache. Otherwise the calls are offline: by HF_HUB_OFFLINE=1 if that is
set, else by the argument local_files_only.
"""

import os
import sys

from huggingface_hub import hf_hub_download

import measured

repo, file, folder, runs = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
if runs == 0:
    hf_hub_download(repo, file, cache_dir=folder)
elif os.environ.get("HF_HUB_OFFLINE") == "1":
    measured.calls(lambda: hf_hub_download(repo, file, cache_dir=folder), runs)
else:
    measured.calls(lambda: hf_hub_download(repo, file, cache_dir=folder, local_files_only=True), runs)
