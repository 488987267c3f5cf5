"""huggingface_hub: what hf_hub_download costs when the file is cached, in process, offline.

usage: hub_warm.py REPO FILE FOLDER RUNS   prints the median, the 10th and the 90th percentile in microseconds
"""

import sys
import time

from huggingface_hub import hf_hub_download

repo, file, folder, runs = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
hf_hub_download(repo, file, cache_dir=folder)
times = []
for _ in range(runs):
    started = time.perf_counter()
    hf_hub_download(repo, file, cache_dir=folder, local_files_only=True)
    times.append((time.perf_counter() - started) * 1e6)
times.sort()
print(*(f"{times[len(times) * share // 100]:.1f}" for share in (50, 10, 90)))
