"""Rolling log-likelihoods: each token once, from as much context as fits, and the sums per word and byte."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import quantkit
from quantkit.rolling import Document, rolling_windows, score_documents


@given(st.integers(0, 60), st.integers(1, 17))
def test_every_token_is_predicted_once_from_the_tokens_before_it(count: int, length: int) -> None:
    tokens = list(range(100, 100 + count))
    seen = []
    for inputs, targets in rolling_windows(tokens, 7, length):
        assert len(targets) <= len(inputs) <= length
        whole = [7, *tokens]
        end = targets[-1] - 100 + 1
        assert inputs == whole[end - len(inputs) : end]  # the last position predicts the last target
        assert len(inputs) == min(length, end)  # no shorter than it could be
        seen += targets
    assert seen == tokens


def test_windows_by_hand() -> None:
    found = list(rolling_windows([1, 2, 3, 4, 5], 0, 2))
    assert found == [([0, 1], [1, 2]), ([2, 3], [3, 4]), ([3, 4], [5])]
    assert list(rolling_windows([], 0, 4)) == []


class Copying(nn.Module):
    """Says that the next token is this one, with probability 1/2, and the rest evenly."""

    device = torch.device("cpu")

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:  # noqa: ARG002
        probabilities = torch.full((*input_ids.shape, 5), 0.125)
        probabilities.scatter_(-1, input_ids[..., None], 0.5)
        return SimpleNamespace(logits=probabilities.log())


def test_a_model_whose_likelihoods_are_known() -> None:
    """Words of the second document: white space at its ends makes empty ones, as lm-evaluation-harness counts."""
    documents = [Document.of("aa b", [1, 1, 2]), Document.of(" é ", [3])]
    model: Any = Copying()
    found = score_documents("m", model, documents, prefix=1, length=2)
    nats = 2 * math.log(2) + 2 * math.log(8)
    assert found.num_tokens == 4
    assert found.log_likelihood == pytest.approx(-nats)
    assert found.word_perplexity == pytest.approx(math.exp(nats / (2 + 3)))
    assert found.byte_perplexity == pytest.approx(math.exp(nats / (4 + 4)))
    assert found.bits_per_byte == pytest.approx(nats / 8 / math.log(2))


def test_logits_that_are_not_finite() -> None:
    class Broken(Copying):
        def forward(self, input_ids: Tensor, use_cache: bool) -> Any:  # noqa: ARG002
            return SimpleNamespace(logits=torch.full((*input_ids.shape, 5), float("nan")))

    model: Any = Broken()
    with pytest.raises(quantkit.CheckpointError, match="m: the model's logits are NaN"):
        score_documents("m", model, [Document.of("a", [1])], prefix=0, length=8)
