"""An application that downloads a model from S3 at startup and computes text embeddings with it.

It accepts requests at once. `/readyz` answers 503 with the bytes and seconds left until the model is loaded.
"""

from typing import Annotated

from fastapi import Depends, FastAPI
from minilm import MiniLM
from modelcache.fastapi import Artifact, ModelCacheLifespan, router, value

NAME, VERSION = "sentence-transformers/minilm-l6", "1"


def load(artifact: Artifact) -> MiniLM:
    """Load the model. Called once, in a thread, when the files are on disk."""
    assert artifact.path is not None
    return MiniLM(artifact.path)


app = FastAPI(lifespan=ModelCacheLifespan([(NAME, VERSION)], on_ready=load))
app.include_router(router)


@app.post("/embed")
def embed(texts: list[str], model: Annotated[MiniLM, Depends(value(NAME, VERSION))]) -> list[list[float]]:
    """Return a vector of 384 numbers for each text, or 503 with Retry-After while the model is not ready."""
    vectors: list[list[float]] = model.embed(texts).tolist()
    return vectors
