"""Downloads a repo with the real client and prints the folder of its files.

usage: snapshot_download.py ENDPOINT REPO TARGET_DIR [REVISION]

REPO may begin with `datasets/` or `spaces/`. The client's cache is inside TARGET_DIR, so nothing else on the machine is
read or written. Exit status 0 means that the client succeeded; the caller compares the files.
"""

import os
import sys


def main() -> None:
    endpoint, repo, target = sys.argv[1:4]
    revision = sys.argv[4] if len(sys.argv) > 4 else "main"
    # huggingface_hub reads these when it is imported.
    os.environ["HF_ENDPOINT"] = endpoint
    os.environ["HF_HOME"] = os.path.join(target, ".hf-home")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")

    from huggingface_hub import snapshot_download

    kinds = {"datasets": "dataset", "spaces": "space"}
    first, _, rest = repo.partition("/")
    repo_type, repo_id = (kinds[first], rest) if first in kinds else ("model", repo)
    path = snapshot_download(
        repo_id,
        repo_type=repo_type,
        revision=revision,
        local_dir=os.path.join(target, "files"),
        token=os.environ.get("HF_TOKEN"),
    )
    print(path)


if __name__ == "__main__":
    main()
