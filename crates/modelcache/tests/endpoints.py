"""Prints, as JSON, the URLs that botocore addresses buckets by: one row per combination of settings."""

import itertools
import json
import sys

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError

REGIONS = [
    "us-east-1", "eu-west-1", "cn-north-1", "us-gov-west-1", "us-iso-east-1", "us-isob-east-1", "ap-southeast-3", "eusc-de-east-1",
]
BUCKETS = ["models", "a.dotted.bucket", "my-models-s3alias"]
CUSTOM_ENDPOINTS = ["http://localhost:9000", "https://s3.example.com", "http://127.0.0.1:9000"]


class Sent(Exception):
    """Carries the URL of a request in place of sending it."""


def stop(request, **_):
    raise Sent(request.url)


def url_of(client, bucket):
    try:
        client.get_object(Bucket=bucket, Key="k")
    except Sent as sent:
        return str(sent).removesuffix("/k")
    except BotoCoreError:
        return None


def rows(session):
    for region, style, fips, dual, endpoint in itertools.product(
        REGIONS, ["auto", "path", "virtual"], [False, True], [False, True], [None, *CUSTOM_ENDPOINTS]
    ):
        config = Config(use_fips_endpoint=fips, use_dualstack_endpoint=dual, s3={"addressing_style": style})
        client = session.create_client(
            "s3", region_name=region, endpoint_url=endpoint, aws_access_key_id="a", aws_secret_access_key="b", config=config
        )
        client.meta.events.register("before-send.s3", stop)
        for bucket in BUCKETS:
            yield {
                "region": region, "style": style, "fips": fips, "dual": dual, "endpoint": endpoint, "bucket": bucket,
                "url": url_of(client, bucket),
            }


json.dump(list(rows(botocore.session.get_session())), sys.stdout)
