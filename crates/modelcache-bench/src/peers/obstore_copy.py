"""obstore: copies one object, or all objects below a prefix, to disk, or uploads one file.

usage: obstore_copy.py get BUCKET KEY FILE | tree BUCKET PREFIX FOLDER | put BUCKET KEY FILE   [CONCURRENCY PART_MIB]

Without CONCURRENCY and PART_MIB, a file is one stream, as in the documentation of obstore. With them, its ranges are
downloaded in threads.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import obstore
from obstore.store import S3Store

verb, bucket, key, path = sys.argv[1:5]
workers, part = (int(sys.argv[5]), int(sys.argv[6]) * 1024 * 1024) if len(sys.argv) > 5 else (0, 0)
# obstore trusts only its built-in root certificates, so certificates are not verified. The cost of the verification is
# negligible beside that of the transfer.
client = {"allow_http": True, "allow_invalid_certificates": True, "timeout": "300s"}
store = S3Store(bucket, endpoint=os.environ["AWS_ENDPOINT_URL"], client_options=client)


def stream(name, target):
    with open(target, "wb") as out:
        for chunk in obstore.get(store, name).stream(min_chunk_size=1024 * 1024):
            out.write(chunk)


def ranges(name, target):
    size = obstore.head(store, name)["size"]
    out = os.open(target, os.O_WRONLY | os.O_CREAT, 0o644)

    def one(at):
        os.pwrite(out, obstore.get_range(store, name, start=at, end=min(at + part, size)), at)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, range(0, size, part)))
    os.close(out)


if verb == "get":
    (ranges if workers else stream)(key, path)
elif verb == "put":
    options = {"chunk_size": part, "max_concurrency": workers} if workers else {}
    obstore.put(store, key, Path(path), **options)
else:
    names = [row["path"] for page in obstore.list(store, prefix=key) for row in page]
    with ThreadPoolExecutor(workers or 1) as pool:
        list(pool.map(lambda name: stream(name, os.path.join(path, os.path.basename(name))), names))
