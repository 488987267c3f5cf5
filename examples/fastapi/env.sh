# An S3 server on this machine, and a cache directory of its own. Source it: `. examples/fastapi/env.sh`
export AWS_ENDPOINT_URL=http://127.0.0.1:9090
export AWS_ACCESS_KEY_ID=example AWS_SECRET_ACCESS_KEY=example AWS_DEFAULT_REGION=us-east-1
export MODEL_CACHE_S3_BUCKET=models
export MODEL_CACHE_DIR=${MODEL_CACHE_DIR:-/tmp/modelcache-example}
