"""An application that loads a real model from S3 at start, and embeds texts with it.

It answers at once: `/readyz` says 503 with bytes and seconds to go until the model is on disk and loaded.
"""

from typing import Annotated

from fastapi import Depends, FastAPI
from minilm import MiniLM
from modelcache.fastapi import Artifact, ModelCacheLifespan, router, value

NAME, VERSION = "sentence-transformers/minilm-l6", "1"


def load(artifact: Artifact) -> MiniLM:
    """Runs once, in a thread, when the files are here."""
    assert artifact.path is not None
    return MiniLM(artifact.path)


app = FastAPI(lifespan=ModelCacheLifespan([(NAME, VERSION)], on_ready=load))
app.include_router(router)


@app.post("/embed")
def embed(texts: list[str], model: Annotated[MiniLM, Depends(value(NAME, VERSION))]) -> list[list[float]]:
    """One vector of 384 numbers for each text; 503 with Retry-After while the model is not ready."""
    vectors: list[list[float]] = model.embed(texts).tolist()
    return vectors
