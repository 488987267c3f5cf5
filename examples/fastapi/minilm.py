"""The model all-MiniLM-L6-v2 in plain numpy, without a framework. It reads the files of the model's folder directly."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file
from tokenizers import Tokenizer

Array = npt.NDArray[np.float32]

LAYERS, HEADS = 6, 12


class MiniLM:
    """The model, loaded from a folder with `tokenizer.json` and `model.safetensors`."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(256)
        self._tensors = {name: each.astype(np.float32) for name, each in load_file(folder / "model.safetensors").items()}

    def embed(self, texts: list[str]) -> Array:
        """Return one vector of length 1 for each text, as an array of shape (texts, 384)."""
        return np.stack([self._embed(text) for text in texts]) if texts else np.empty((0, 384), np.float32)

    def _embed(self, text: str) -> Array:
        ids = self._tokenizer.encode(text).ids
        ids = [each for each in ids if each != 0]  # 0 is the padding token.
        x = self._weights("embeddings.word_embeddings")[ids]
        x = x + self._weights("embeddings.position_embeddings")[: len(ids)]
        x = self._norm(x + self._weights("embeddings.token_type_embeddings")[0], "embeddings.LayerNorm")
        for layer in range(LAYERS):
            at = f"encoder.layer.{layer}"
            x = self._norm(x + self._attention(x, at), f"{at}.attention.output.LayerNorm")
            inner = _gelu(self._linear(x, f"{at}.intermediate.dense"))
            x = self._norm(x + self._linear(inner, f"{at}.output.dense"), f"{at}.output.LayerNorm")
        # The embedding is the normalized mean over all tokens.
        mean = x.mean(axis=0)
        vector: Array = mean / np.linalg.norm(mean)
        return vector

    def _attention(self, x: Array, at: str) -> Array:
        def heads(part: str) -> Array:
            return self._linear(x, f"{at}.attention.self.{part}").reshape(len(x), HEADS, -1).transpose(1, 0, 2)

        query, key, values = heads("query"), heads("key"), heads("value")
        scores = query @ key.transpose(0, 2, 1) / np.sqrt(query.shape[-1])
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        mixed = (weights @ values).transpose(1, 0, 2).reshape(len(x), -1)
        return self._linear(mixed, f"{at}.attention.output.dense")

    def _linear(self, x: Array, at: str) -> Array:
        return x @ self._weights(at).T + self._tensors[f"{at}.bias"]

    def _norm(self, x: Array, at: str) -> Array:
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-12)
        return x * self._weights(at) + self._tensors[f"{at}.bias"]

    def _weights(self, at: str) -> Array:
        return self._tensors[f"{at}.weight"]


def _gelu(x: Array) -> Array:
    """Gaussian error linear unit, with formula 7.1.26 of Abramowitz and Stegun for erf (correct to seven digits)."""
    z = np.abs(x) / np.sqrt(2)
    t = 1 / (1 + 0.3275911 * z)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    erf = np.sign(x) * (1 - series * np.exp(-z * z))
    result: Array = 0.5 * x * (1 + erf)
    return result
