"""quantkit.perplexity against plain, independent loops on tiny random models."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCAB, save_tiny
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from quantkit.errors import CalibrationError, CheckpointError, InputError
from quantkit.perplexity import Windows, plan_windows, score_models

LENGTH = 48
NAMES = ("one", "two")


def open_model(path: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.eval()
    return model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, PreTrainedModel]]:
    """Two llamas of different weights, with distributions far from uniform."""
    root = tmp_path_factory.mktemp("loaded")
    paths = [save_tiny("llama", root / name, seed=n, initializer_range=0.3) for n, name in enumerate(NAMES)]
    return [(name, open_model(path)) for name, path in zip(NAMES, paths, strict=True)]


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(VOCAB, (LENGTH * 7 + 13,), generator=torch.Generator().manual_seed(11))


# --- windows ----------------------------------------------------------------------------------------------


@given(st.data())
def test_windows_score_each_token_once_with_enough_context(data: st.DataObject) -> None:
    length = data.draw(st.integers(2, 40))
    stride = data.draw(st.integers(1, length))
    num_tokens = data.draw(st.integers(length, 300))
    limit = data.draw(st.none() | st.integers(1, 50))
    windows = plan_windows(num_tokens, length, stride, limit)
    tokens = torch.arange(num_tokens)
    batch = windows.batch(tokens, range(windows.count))
    assert batch.shape == (windows.count, length)
    scored = [t for i in range(windows.count) for t in batch[i, length - windows.scored(i) :].tolist()]
    assert len(scored) == len(set(scored)) == windows.num_scored
    starts = set(batch[:, 0].tolist())
    if stride < length:
        assert scored == list(range(1, windows.end))
    else:
        assert sorted({*scored, *starts}) == list(range(windows.end))
    assert windows.end == int(batch[-1, -1]) + 1
    assert windows.scored(1) <= stride
    if limit is None or windows.count < limit:
        assert 0 <= num_tokens - windows.end < stride
    else:
        assert windows.count == limit


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((100, 1), InputError, "sequence_length=1"),
        ((100, 10, 0), InputError, "choose 1 to 10"),
        ((100, 10, 11), InputError, "stride=11"),
        ((100, 10, None, 0), InputError, "limit=0"),
        ((99, 100), CalibrationError, "99 tokens"),
        ((0, 2), CalibrationError, "0 tokens"),
    ],
)
def test_windows_refuse(arguments: tuple[int, ...], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        plan_windows(*arguments)


# --- scores -----------------------------------------------------------------------------------------------


def plain_perplexity(
    model: PreTrainedModel, tokens: Tensor, length: int, stride: int | None, limit: int | None
) -> float:
    """The transformers documentation's loop, whole windows only and each token with the same weight."""
    total, count, previous_end = 0.0, 0, 0
    for index, begin in enumerate(range(0, len(tokens), stride or length)):
        end = begin + length
        if end > len(tokens) or index == limit:
            break
        labels = tokens[None, begin:end].clone()
        labels[:, : -(end - previous_end)] = -100
        valid = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            loss = model(tokens[None, begin:end], labels=labels).loss
        total, count, previous_end = total + loss.item() * valid, count + valid, end
    return math.exp(total / count)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    ("stride", "limit"), [(None, None), (LENGTH, 4), (LENGTH - 1, None), (17, None), (17, 5), (1, 9)]
)
def test_perplexity_is_that_of_a_plain_loop(
    loaded: list[tuple[str, PreTrainedModel]],
    tokens: Tensor,
    batch_size: int,
    stride: int | None,
    limit: int | None,
) -> None:
    windows = plan_windows(len(tokens), LENGTH, stride, limit)
    scores = score_models(loaded, tokens, windows, batch_size=batch_size)
    for (_, model), score in zip(loaded, scores, strict=True):
        assert score.perplexity == pytest.approx(plain_perplexity(model, tokens, LENGTH, stride, limit), rel=1e-5)
        assert score.num_tokens == windows.num_scored


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt"])
def test_other_families_score_like_a_plain_loop(tmp_path: Path, tokens: Tensor, family: str) -> None:
    model = open_model(save_tiny(family, tmp_path))
    (score,) = score_models([(family, model)], tokens, plan_windows(len(tokens), LENGTH), batch_size=2)
    assert score.perplexity == pytest.approx(plain_perplexity(model, tokens, LENGTH, None, None), rel=1e-5)


def plain_divergence(p: PreTrainedModel, q: PreTrainedModel, tokens: Tensor, windows: Windows) -> tuple[float, float]:
    divergences, changed = [], []
    for i in range(windows.count):
        window = tokens[None, i * windows.stride :][:, : windows.length]
        with torch.no_grad():
            a, b = (model(window).logits[0, -windows.scored(i) - 1 : -1].double() for model in (p, q))
        divergences.append(
            torch.distributions.kl_divergence(
                torch.distributions.Categorical(logits=a), torch.distributions.Categorical(logits=b)
            )
        )
        changed.append((a.argmax(-1) != b.argmax(-1)).double())
    return torch.cat(divergences).mean().item(), torch.cat(changed).mean().item()


@pytest.mark.parametrize("stride", [None, 20])
@pytest.mark.parametrize("chunk", [7, 256])
def test_divergence_is_that_of_the_full_distributions(
    loaded: list[tuple[str, PreTrainedModel]], tokens: Tensor, stride: int | None, chunk: int
) -> None:
    windows = plan_windows(len(tokens), LENGTH, stride)
    first, second = score_models(loaded, tokens, windows, batch_size=2, chunk=chunk)
    kl, changed = plain_divergence(loaded[0][1], loaded[1][1], tokens, windows)
    assert (first.kl, first.top1_changed) == (0.0, 0.0)
    assert second.kl == pytest.approx(kl, rel=1e-5)
    assert second.kl > 0.1
    assert second.top1_changed == pytest.approx(changed, abs=1e-12)
    back = score_models(loaded[::-1], tokens, windows)[1]
    assert abs(back.kl - second.kl) > 1e-3, "the direction of the divergence must matter"


def test_a_model_does_not_diverge_from_itself(loaded: list[tuple[str, PreTrainedModel]], tokens: Tensor) -> None:
    first, other, again = score_models([*loaded, loaded[0]], tokens, plan_windows(len(tokens), LENGTH))
    assert (again.kl, again.top1_changed) == (0.0, 0.0)
    assert again.perplexity == first.perplexity != other.perplexity


def test_standard_error_is_that_of_the_windows_means(loaded: list[tuple[str, PreTrainedModel]], tokens: Tensor) -> None:
    windows = plan_windows(len(tokens), LENGTH)
    (score, *_) = score_models(loaded, tokens, windows)
    model = loaded[0][1]
    means = []
    for i in range(windows.count):
        window = tokens[None, i * LENGTH : (i + 1) * LENGTH]
        with torch.no_grad():
            means.append(model(window, labels=window).loss.double())
    error = torch.stack(means).std(correction=1).item() / math.sqrt(windows.count)
    assert score.stderr == pytest.approx(score.perplexity * error, rel=1e-4)


def test_one_window_has_no_standard_error(loaded: list[tuple[str, PreTrainedModel]], tokens: Tensor) -> None:
    (score, *_) = score_models(loaded, tokens, plan_windows(len(tokens), LENGTH, limit=1))
    assert score.stderr is None


class Sleeper(torch.nn.Module):
    """A causal language model that takes as long as it is told: first call, later calls (seconds)."""

    device = torch.device("cpu")

    def __init__(self, first: float, later: float) -> None:
        super().__init__()
        self.delays = iter([first])
        self.later = later

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        assert not use_cache
        time.sleep(next(self.delays, self.later))
        return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 10)})


def test_speed_counts_the_forward_after_a_warm_up(tokens: Tensor) -> None:
    windows = plan_windows(len(tokens), LENGTH, limit=4)
    slow: Any = Sleeper(first=1.0, later=0.05)
    fast: Any = Sleeper(first=0.0, later=0.01)
    scores = score_models([("slow", slow), ("fast", fast)], tokens % 10, windows)
    seconds = [4 * LENGTH / score.tokens_per_second for score in scores]
    assert 0.2 <= seconds[0] < 1.0
    assert 0.04 <= seconds[1] < seconds[0]


def test_models_are_scored_in_eval_mode(tmp_path: Path, tokens: Tensor) -> None:
    model = open_model(save_tiny("gpt2", tmp_path, resid_pdrop=0.5))
    windows = plan_windows(len(tokens), LENGTH)
    expected = score_models([("m", model)], tokens, windows)[0].perplexity
    assert score_models([("m", model.train())], tokens, windows)[0].perplexity == expected


def test_progress_counts_windows(loaded: list[tuple[str, PreTrainedModel]], tokens: Tensor) -> None:
    calls: list[tuple[int, int]] = []
    windows = plan_windows(len(tokens), LENGTH)
    score_models(loaded[:1], tokens, windows, batch_size=3, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(3, 7), (6, 7), (7, 7)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_logits_name_the_model(
    tmp_path: Path, loaded: list[tuple[str, PreTrainedModel]], tokens: Tensor, value: float
) -> None:
    broken: Any = open_model(save_tiny("llama", tmp_path))
    with torch.no_grad():
        broken.lm_head.weight[3] = value
    with pytest.raises(CheckpointError, match=r"^broken: .*NaN or infinite"):
        score_models([loaded[0], ("broken", broken)], tokens, plan_windows(len(tokens), LENGTH))


def test_a_loss_beyond_all_bounds_is_an_error(tmp_path: Path, tokens: Tensor) -> None:
    broken: Any = open_model(save_tiny("llama", tmp_path))
    with torch.no_grad():
        broken.lm_head.weight *= 1e4
    with pytest.raises(CheckpointError, match=r"^broken: a mean loss of \d+ nats"):
        score_models([("broken", broken)], tokens, plan_windows(len(tokens), LENGTH))


def test_vocabularies_must_be_of_one_size(
    tmp_path: Path, loaded: list[tuple[str, PreTrainedModel]], tokens: Tensor
) -> None:
    larger = open_model(save_tiny("llama", tmp_path, vocab_size=VOCAB + 64))
    with pytest.raises(CheckpointError, match=rf"^larger: {VOCAB + 64} logits a token, but one has {VOCAB}"):
        score_models([loaded[0], ("larger", larger)], tokens, plan_windows(len(tokens), LENGTH))
