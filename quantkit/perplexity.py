"""Perplexity and divergence of language models on the same tokens: pure functions over models and tokens.

The protocol is that of the GPTQ paper (arXiv:2210.17323): the tokens of a whole text are cut into windows of
one length that do not overlap, and each window is scored for its tokens 2..length. With a stride below the
length the windows overlap and each later window is scored for its last ``stride`` tokens only, so that every
scored token but the first ones has at least ``length - stride`` tokens of context (the sliding window of the
transformers documentation; unlike the example there, each token counts once, with the same weight). In both,
what is left after the last whole window is dropped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantkit.errors import CalibrationError, CheckpointError, InputError, message
from quantkit.precision import forward_products

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int], None]
"""Called after every batch with the number of windows done and the number of windows in all."""


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of one length over a row of tokens; window ``i`` starts at token ``i * stride``.

    Attributes:
        length: tokens in a window, at least 2.
        stride: tokens from one window's start to the next one's, 1 to ``length``.
        count: number of windows, at least 1.
    """

    length: int
    stride: int
    count: int

    def scored(self, index: int) -> int:
        """How many tokens of window ``index`` are scored: its last ones; a text's first token never is."""
        return self.length - 1 if index == 0 else min(self.stride, self.length - 1)

    @property
    def num_scored(self) -> int:
        """Scored tokens in all windows."""
        return self.scored(0) + (self.count - 1) * self.scored(1)

    @property
    def end(self) -> int:
        """Number of tokens from the first window's start to the last one's end."""
        return (self.count - 1) * self.stride + self.length

    def batch(self, tokens: Tensor, rows: range) -> Tensor:
        """The windows ``rows`` of ``tokens`` (int64 [tokens]), stacked: int64 [rows, length]."""
        return torch.stack([tokens[i * self.stride : i * self.stride + self.length] for i in rows])


def plan_windows(num_tokens: int, length: int, stride: int | None = None, limit: int | None = None) -> Windows:
    """Lay whole windows over ``num_tokens`` tokens.

    Args:
        num_tokens: length of the text in tokens.
        length: tokens in a window.
        stride: None means ``length``, windows that do not overlap.
        limit: at most this many windows; None means all.

    Raises:
        InputError: a length, stride or limit out of range.
        CalibrationError: fewer tokens than one window needs.
    """
    if length < 2:
        raise InputError(message("perplexity", f"sequence_length={length} leaves nothing to predict", "use 2 or more"))
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise InputError(
            message(
                "perplexity",
                f"stride={stride} skips or repeats tokens",
                f"choose 1 to {length} (sequence_length)",
            )
        )
    if limit is not None and limit < 1:
        raise InputError(message("perplexity", f"limit={limit} is no window at all", "use 1 or more, or no limit"))
    if num_tokens < length:
        raise CalibrationError(
            message(
                "perplexity",
                f"the text has {num_tokens} tokens, fewer than one window of {length}",
                "give a longer text or a smaller sequence_length",
            )
        )
    available = 1 + (num_tokens - length) // stride
    return Windows(length, stride, available if limit is None else min(limit, available))


@dataclass(frozen=True, slots=True)
class Score:
    """What one model did on the scored tokens.

    Attributes:
        perplexity: exp of the mean negative log-likelihood.
        stderr: standard error of the perplexity, the windows taken as independent blocks (delta method on the
            mean negative log-likelihood); None with a single window.
        kl: mean over the scored tokens of KL(first model || this model), from the full distributions, in
            nats; 0.0 for the first model.
        top1_changed: share of scored tokens whose most likely token differs from the first model's.
        num_tokens: scored tokens.
        tokens_per_second: tokens put in (scored or not) by seconds in the model's forward.
    """

    perplexity: float
    stderr: float | None
    kl: float
    top1_changed: float
    num_tokens: int
    tokens_per_second: float


@dataclass(slots=True)
class _Tally:
    """One model's running sums; per-window ones as lists, all in double precision."""

    nll: list[float] = field(default_factory=list)
    kl: float = 0.0
    changed: int = 0
    seconds: float = 0.0

    def finish(self, name: str, windows: Windows) -> Score:
        """Turn the sums into a score."""
        counts = [windows.scored(i) for i in range(windows.count)]
        total = sum(counts)
        mean = sum(self.nll) / total
        try:
            perplexity = math.exp(mean)
        except OverflowError:
            raise CheckpointError(
                message(name, f"a mean loss of {mean:.0f} nats has no finite perplexity", "check the checkpoint")
            ) from None
        error = _mean_error(self.nll, counts)
        return Score(
            perplexity=perplexity,
            stderr=None if error is None else perplexity * error,
            kl=max(0.0, self.kl / total),  # below zero is rounding: the divergence is not
            top1_changed=self.changed / total,
            num_tokens=total,
            tokens_per_second=windows.count * windows.length / self.seconds,
        )


def _mean_error(sums: Sequence[float], counts: Sequence[int]) -> float | None:
    """Standard error of ``sum(sums) / sum(counts)`` over independent blocks; None with one block.

    The linearised estimator of a ratio (Cochran, Sampling Techniques, chapter 6); with equal counts it is the
    standard error of the mean of the blocks' means.
    """
    blocks, total = len(sums), sum(counts)
    if blocks < 2:
        return None
    mean = sum(sums) / total
    squares = sum((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True))
    return math.sqrt(blocks / (blocks - 1) * squares) / total


def score_models(
    models: Sequence[tuple[str, PreTrainedModel]],
    tokens: Tensor,
    windows: Windows,
    *,
    batch_size: int = 1,
    chunk: int = 256,
    progress: Progress | None = None,
) -> tuple[Score, ...]:
    """Score every model on the same windows of the same tokens; divergences are from the first model.

    Each batch goes through all models in turn, so the first model's logits are computed once and the speeds
    are measured interleaved. Speed is the forward alone, after one untimed pass over the first batch. Memory:
    the models, two models' logits [batch_size, length, vocabulary] in the models' dtype, and four float32
    [chunk, vocabulary].

    Args:
        models: names (for error messages) and causal language models, each on one device; put into eval mode.
        tokens: int64 [tokens], on the CPU, at least ``windows.end`` of them.
        windows: which tokens to score, see ``plan_windows``.
        batch_size: windows in one forward pass, at least 1.
        chunk: positions whose distributions are in float32 at a time; the result does not depend on it.
        progress: called after every batch.

    Raises:
        CheckpointError: vocabularies of different sizes, or NaN or infinite logits.
    """
    tallies = [_Tally() for _ in models]
    with torch.inference_mode(), forward_products(*(model.device for _, model in models)):
        _warm_up(models, windows.batch(tokens, range(min(batch_size, windows.count))))
        for start in range(0, windows.count, batch_size):
            rows = range(start, min(start + batch_size, windows.count))
            batch = windows.batch(tokens, rows)
            reference: Tensor | None = None
            for (name, model), tally in zip(models, tallies, strict=True):
                logits, seconds = _forward(model, batch)
                tally.seconds += seconds
                for row, window in enumerate(rows):
                    last = slice(windows.length - 1 - windows.scored(window), windows.length - 1)
                    targets = batch[row, last.start + 1 :]
                    compared = None if reference is None else reference[row, last]
                    _add_window(tally, name, logits[row, last], targets, compared, chunk)
                reference = logits if reference is None else reference
                del logits  # before the next model makes its own
            if progress is not None:
                progress(rows.stop, windows.count)
    return tuple(tally.finish(name, windows) for (name, _), tally in zip(models, tallies, strict=True))


def _warm_up(models: Sequence[tuple[str, PreTrainedModel]], batch: Tensor) -> None:
    """Run the first batch untimed through every model (lazy set-up, caches) and compare the vocabularies."""
    sizes: list[int] = []
    for name, model in models:
        model.eval()
        sizes.append(_forward(model, batch)[0].shape[-1])
        if sizes[-1] != sizes[0]:
            raise CheckpointError(
                message(
                    name,
                    f"{sizes[-1]} logits a token, but {models[0][0]} has {sizes[0]}",
                    "compare models of one vocabulary, or run them separately",
                )
            )


def _forward(model: PreTrainedModel, batch: Tensor) -> tuple[Tensor, float]:
    """Logits [rows, length, vocabulary] of ``batch``, on the model's device, and the forward's seconds."""
    inputs = batch.to(model.device)
    _synchronize(inputs.device)
    start = time.perf_counter()
    logits: Tensor = model(input_ids=inputs, use_cache=False).logits
    _synchronize(inputs.device)
    return logits, time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    """Wait until an accelerator has finished, so that the clock sees its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _add_window(
    tally: _Tally, name: str, logits: Tensor, targets: Tensor, reference: Tensor | None, chunk: int
) -> None:
    """Add one window to ``tally``: ``logits`` [positions, vocabulary], ``targets`` int64 [positions]."""
    nll = 0.0
    for start in range(0, len(targets), chunk):
        part = slice(start, start + chunk)
        if not all(bool(torch.isfinite(extreme)) for extreme in logits[part].aminmax()):
            raise CheckpointError(
                message(
                    name,
                    "the model's logits are NaN or infinite",
                    "check the checkpoint, or load it in a dtype of wider range (bfloat16, float32)",
                )
            )
        nll += _add_chunk(tally, logits[part], targets[part], None if reference is None else reference[part])
    tally.nll.append(nll)


def _add_chunk(tally: _Tally, logits: Tensor, targets: Tensor, reference: Tensor | None) -> float:
    """Add divergences to ``tally`` and return the negative log-likelihood, a sum over the positions.

    At most four float32 [positions, vocabulary] are alive: hence the operations in place.
    """
    log_q = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    nll = -_sum(log_q.gather(-1, targets[:, None].to(log_q.device)))
    if reference is not None:
        reference = reference.to(logits.device)
        tally.changed += int((reference.argmax(-1) != logits.argmax(-1)).sum())
        log_p = torch.log_softmax(reference, dim=-1, dtype=torch.float32)
        difference = log_q.neg_().add_(log_p)
        tally.kl += _sum(log_p.exp_().mul_(difference).sum(-1))
    return nll


def _sum(values: Tensor) -> float:
    """Sum in float64, on the CPU because not every accelerator has float64."""
    return float(values.cpu().double().sum())
