"""boto3: copies one object, or all objects below a prefix, to disk, or uploads one file.

usage: boto3_copy.py get BUCKET KEY FILE | tree BUCKET PREFIX FOLDER | put BUCKET KEY FILE   [CONCURRENCY PART_MIB]
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config

verb, bucket, key, path = sys.argv[1:5]
transfer, client = TransferConfig(), Config(s3={"addressing_style": "path"})
workers = 1
if len(sys.argv) > 5:
    workers, part = int(sys.argv[5]), int(sys.argv[6]) * 1024 * 1024
    transfer = TransferConfig(max_concurrency=workers, multipart_chunksize=part)
    client = Config(s3={"addressing_style": "path"}, max_pool_connections=workers)
s3 = boto3.client("s3", config=client)

if verb == "get":
    s3.download_file(bucket, key, path, Config=transfer)
elif verb == "put":
    s3.upload_file(path, bucket, key, Config=transfer)
else:
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key)
    keys = [row["Key"] for page in pages for row in page.get("Contents", [])]

    def fetch(name):
        s3.download_file(bucket, name, os.path.join(path, os.path.basename(name)), Config=transfer)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(fetch, keys))
