"""Quantized checkpoints of one model on the same windows: what separates them, and the errors of that.

    cd evals && python -m quality.paired DENSE FIRST OTHER... --text wikitext2/valid.txt
    cd evals && python -m quality.paired builtin FIRST OTHER... --text builtin --windows 164

The errors in the study's table are those of a text: another text moves all rows alike. What separates two rows is how
their difference spreads from window to window, which this prints: mean and standard error of the difference of the
negative log-likelihood and of the KL divergence from the dense model, in nats a token.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from smollm2.study import halves
from table import markdown
from torch import Tensor, nn

import quantkit
from quantkit.source import open_tokenizer, resolve_model
from quantkit.text import evaluation_text

LENGTH = 512  # as in study.py


@dataclass
class Scores:
    """Of one model, a mean over the tokens of each window, in nats: negative log-likelihood and KL divergence."""

    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description="What separates quantized checkpoints of one model.")
    parser.add_argument("dense", type=resolve_model, help="the model before, a directory or builtin")
    parser.add_argument("models", nargs="+", type=Path, help="quantized; differences are from the first of them")
    parser.add_argument("--text", required=True, help="its second half is scored; or builtin")
    parser.add_argument("--windows", type=int, default=64, help=f"windows of {LENGTH} tokens")
    args = parser.parse_args()
    windows = list(read_windows(args.dense, args.text, args.windows))
    print(render(args.models, score(args.dense, args.models, windows)))
    print(f"{len(windows)} windows of {LENGTH} tokens.")


def read_windows(model: Path, text: str, limit: int) -> Iterator[Tensor]:
    """The study's windows, int64 [1, LENGTH] each."""
    with tempfile.TemporaryDirectory() as directory:
        read = evaluation_text(text if text == "builtin" else str(halves(Path(text), Path(directory))[1]))
    tokens = torch.tensor(open_tokenizer(model)(read.text, verbose=False)["input_ids"])
    yield from tokens[: len(tokens) // LENGTH * LENGTH].view(-1, 1, LENGTH)[:limit]


def score(dense: Path, models: Sequence[Path], windows: Sequence[Tensor]) -> list[Scores]:
    """Every model on every window, in float32; all of them are in memory at once."""
    exactly, *others = (quantkit.load(path, dtype="float32") for path in (dense, *models))
    found = [Scores() for _ in others]
    with torch.inference_mode():
        for window in windows:
            exact, targets = log_probabilities(exactly, window), window[0, 1:, None]
            for model, scores in zip(others, found, strict=True):
                given = log_probabilities(model, window)
                scores.nll.append(-float(given.gather(-1, targets).double().mean()))
                scores.kl.append(float((exact.exp() * (exact - given)).sum(-1).double().mean()))
    return found


def log_probabilities(model: nn.Module, window: Tensor) -> Tensor:
    """float32 [length - 1, vocabulary]."""
    return torch.log_softmax(model(input_ids=window, use_cache=False).logits[0, :-1].float(), dim=-1)


def difference(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Mean of the differences and its standard error, the windows taken as independent."""
    found = [a - b for a, b in zip(one, other, strict=True)]
    return statistics.mean(found), statistics.stdev(found) / math.sqrt(len(found))


def render(models: Sequence[Path], scores: Sequence[Scores]) -> str:
    """A line for each model: its scores, and how far it is from the first one."""
    first, body = scores[0], []
    for path, one in zip(models, scores, strict=True):
        apart = ["", ""]
        if one is not first:
            found = (difference(one.nll, first.nll), difference(one.kl, first.kl))
            apart = [f"{mean:+.4f} ± {error:.4f}" for mean, error in found]
        means = [statistics.mean(values) for values in (one.nll, one.kl)]
        body.append([path.name, f"{math.exp(means[0]):.2f}", f"{means[1]:.4f}", *apart])
    return markdown(["model", "perplexity", "KL", "NLL less the first's", "KL less the first's"], body)


if __name__ == "__main__":
    main()
