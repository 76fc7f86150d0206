"""The perplexities of lm-evaluation-harness: each document by itself, per word and per byte.

A document's rolling log-likelihood (lm-evaluation-harness 0.4, ``loglikelihood_rolling``): every one of its tokens is
predicted once. Windows hold ``length`` tokens of input. The first begins with a prefix token, so that the document's
first token is predicted from something; each later one predicts the next tokens that fit, and the last one reaches
back over tokens that are scored already, so that it is as long as the others. With the sum L of a document's
log-likelihoods, over all documents,

    word_perplexity = exp(-Σ L / Σ words)
    byte_perplexity = exp(-Σ L / Σ bytes)
    bits_per_byte = -Σ L / (Σ bytes · ln 2),

words being what white space separates, bytes those of UTF-8. Figures per word and per byte compare across tokenizers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantkit.errors import CheckpointError, message
from quantkit.perplexity import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WHITE = re.compile(r"\s+")
_CHUNK = 256  # positions whose distributions are in float32 at a time


@dataclass(frozen=True, slots=True)
class Document:
    """A document to score.

    Attributes:
        tokens: ids, with the special ones that its tokenizer adds.
        words: pieces between white space.
        nbytes: of its UTF-8 form.
    """

    tokens: Sequence[int]
    words: int
    nbytes: int

    @classmethod
    def of(cls, text: str, tokens: Sequence[int]) -> Document:
        """The document of a text, counted as lm-evaluation-harness counts."""
        return cls(tokens, len(_WHITE.split(text)), len(text.encode()))


@dataclass(frozen=True, slots=True)
class RollingScore:
    """See the module.

    Attributes:
        log_likelihood: Σ L, in nats.
        num_tokens: predicted tokens.
    """

    word_perplexity: float
    byte_perplexity: float
    bits_per_byte: float
    log_likelihood: float
    num_tokens: int


def rolling_windows(tokens: Sequence[int], prefix: int, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Inputs of at most ``length`` tokens, and the targets: what their last positions are to predict.

    Args:
        tokens: of one document; an empty one has no window.
        prefix: what stands before the first token.
        length: at least 1.
    """
    behind = [prefix, *tokens]
    for start in range(0, len(tokens), length):
        end = min(start + length, len(tokens))
        yield list(behind[max(0, end - length) : end]), list(tokens[start:end])


def score_documents(
    name: str,
    model: PreTrainedModel,
    documents: Sequence[Document],
    *,
    prefix: int,
    length: int,
    progress: Progress | None = None,
) -> RollingScore:
    """Score a model on documents.

    Args:
        name: the model's, for error messages.
        model: on one device; put into eval mode.
        documents: at least one of them with a token.
        prefix: see :func:`rolling_windows`.
        length: see :func:`rolling_windows`.
        progress: called after every document.

    Raises:
        CheckpointError: logits that are not finite.
    """
    model.eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for done, document in enumerate(documents, 1):
            for inputs, targets in rolling_windows(document.tokens, prefix, length):
                logits = model(input_ids=torch.tensor([inputs], device=model.device), use_cache=False).logits[0]
                total += _log_likelihood(name, logits[-len(targets) :], torch.tensor(targets))
                count += len(targets)
            if progress is not None:
                progress(done, len(documents))
    words, nbytes = sum(d.words for d in documents), sum(d.nbytes for d in documents)
    try:
        per_word, per_byte = math.exp(-total / words), math.exp(-total / nbytes)
    except OverflowError:
        what = f"a mean loss of {-total / words:.0f} nats a word has no finite perplexity"
        raise CheckpointError(message(name, what, "check the checkpoint")) from None
    return RollingScore(per_word, per_byte, -total / nbytes / math.log(2), total, count)


def _log_likelihood(name: str, logits: Tensor, targets: Tensor) -> float:
    """Σ log p of ``targets`` int64 [positions] under ``logits`` [positions, vocabulary]; summed in float64."""
    total = 0.0
    for start in range(0, len(targets), _CHUNK):
        part = slice(start, start + _CHUNK)
        found = torch.log_softmax(logits[part], dim=-1, dtype=torch.float32)
        total += float(found.gather(-1, targets[part, None].to(found.device)).cpu().double().sum())
    if not math.isfinite(total):
        fix = "check the checkpoint, or load it in a dtype of wider range (bfloat16, float32)"
        raise CheckpointError(message(name, "the model's logits are NaN or infinite", fix))
    return total
