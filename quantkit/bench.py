"""How fast models decode here: each in a process of its own, in turn, so that memory is its own and noise is shared."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantkit.embedding import QuantEmbedding
from quantkit.errors import CheckpointError, InputError, InterruptedRunError, message
from quantkit.generation import Decoder
from quantkit.quiet import quiet
from quantkit.rounded_head import check_head_bits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BANDWIDTH_BYTES = 2**28  # read to measure the bandwidth: beyond any cache
_WARM_UP = 3  # steps that are not counted


@dataclass(frozen=True, slots=True)
class BenchSpec:
    """What is measured.

    Attributes:
        prompt_tokens: length of the prompt (of random tokens).
        new_tokens: steps that are timed.
        rounds: times that each model is measured; medians are reported.
        compiled: whether the step is compiled.
        device, dtype, backend, head_bits: as in :func:`quantkit.load`.

    Raises:
        InputError: a count below 1, or head_bits out of range.
    """

    prompt_tokens: int = 128
    new_tokens: int = 64
    rounds: int = 3
    compiled: bool = False
    device: str = "auto"
    dtype: str = "auto"
    backend: str | None = None
    head_bits: int | None = None

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "rounds"):
            if getattr(self, name) < 1:
                option = f"--{name.replace('_', '-')}"
                raise InputError(message(option, f"{getattr(self, name)} is out of range", "choose at least 1"))
        check_head_bits(self.head_bits)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class BenchResult:
    """One model's figures.

    Attributes:
        model: as it was named.
        prefill_tokens_per_second: of the prompt.
        first_token_seconds: from the prompt to the first token.
        decode_tokens_per_second: by the median step.
        peak_bytes: the most memory: of the process on a CPU (imports included), allocated by torch on a GPU.
        bytes_per_token: weights and cache that a step reads.
        bandwidth: bytes a second of a plain read of memory, measured beside it.
        notes: what was done to the model when it was opened, in words.
    """

    model: str
    prefill_tokens_per_second: float
    first_token_seconds: float
    decode_tokens_per_second: float
    peak_bytes: int
    bytes_per_token: int
    bandwidth: float
    notes: tuple[str, ...] = ()

    @property
    def mbu(self) -> float:
        """Memory bandwidth utilization: the share of the plain read's speed at which a step reads its bytes."""
        return self.bytes_per_token * self.decode_tokens_per_second / self.bandwidth

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "mbu": self.mbu}


def bench(
    models: Sequence[str], spec: BenchSpec, progress: Callable[[int, int], None] | None = None
) -> list[BenchResult]:
    """Measure models, round by round, each time in a new process.

    Args:
        models: directories, hub ids or ``builtin``.
        spec: what to measure.
        progress: told how many of all measurements are done.

    Raises:
        InputError: a model that cannot be opened or is too short for the prompt.
        InterruptedRunError: a model for which there is no memory.
    """
    found: list[list[BenchResult]] = [[] for _ in models]
    total, done = spec.rounds * len(models), 0
    for _ in range(spec.rounds):
        for model, results in zip(models, found, strict=True):
            results.append(_in_process(model, spec))
            done += 1
            if progress is not None:
                progress(done, total)
    return [_medians(results) for results in found]


def _in_process(model: str, spec: BenchSpec) -> BenchResult:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=quiet) as process:
        try:
            return process.submit(measure, model, spec).result()
        except BrokenProcessPool as error:
            what = "the process that measured it was killed"
            raise InterruptedRunError(message(model, what, "is there enough memory for it?")) from error


def measure(model: str, spec: BenchSpec) -> BenchResult:
    """One measurement, in this process; see :func:`bench`."""
    from quantkit.opening import open_for_decoding

    opened, notes = open_for_decoding(
        model, device=spec.device, dtype=spec.dtype, backend=spec.backend, head_bits=spec.head_bits
    )
    device = opened.device
    decoder = Decoder(opened, spec.prompt_tokens + _WARM_UP + spec.new_tokens, compiled=spec.compiled)
    vocabulary = opened.config.get_text_config().vocab_size
    prompt = torch.randint(vocabulary, (spec.prompt_tokens,), generator=torch.Generator().manual_seed(0))
    logits = decoder.prefill(prompt)
    if not bool(logits.isfinite().all()):
        raise CheckpointError(message(model, "its logits are not finite", "check the model, or use --dtype float32"))
    first = _seconds(lambda: decoder.prefill(prompt), device)
    token = int(logits.argmax())
    for _ in range(_WARM_UP):
        token = int(decoder.step(token).argmax())
    steps = [_seconds(lambda: decoder.step(token), device) for _ in range(spec.new_tokens)]
    middle = spec.prompt_tokens + _WARM_UP + spec.new_tokens // 2  # tokens, at the middle step
    return BenchResult(
        model=model,
        prefill_tokens_per_second=spec.prompt_tokens / first,
        first_token_seconds=first,
        decode_tokens_per_second=1 / statistics.median(steps),
        peak_bytes=_peak_bytes(device),
        bytes_per_token=weight_bytes(opened) + decoder.cache_bytes(middle),
        bandwidth=read_bandwidth(device),
        notes=notes,
    )


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that one token reads: all tensors, of an embedding that is no head only one row, and of
    experts the share of those that a token is sent to."""
    head = getattr(model.get_output_embeddings(), "_parameters", {}).get("weight")
    total = 0.0
    for name, module in model.named_modules():
        tensors = [*module._parameters.values(), *module._buffers.values()]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
        if isinstance(module, nn.Embedding | QuantEmbedding):
            tied = isinstance(module, nn.Embedding) and module.weight is head
            size = 0 if tied else size // module.num_embeddings
        total += size * _share(model, name)
    return round(total)


def _share(model: PreTrainedModel, name: str) -> float:
    """Of a module of experts, the share that a token is sent to; 1 for all others."""
    config = model.config.get_text_config()
    chosen = getattr(config, "num_experts_per_tok", None)
    counts = (getattr(config, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts"))
    experts = next((count for count in counts if isinstance(count, int) and count > 0), None)
    if "experts" not in name.split(".") or not isinstance(chosen, int) or experts is None:
        return 1.0
    return chosen / experts


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second at which torch sums a large tensor there: the median of five."""
    buffer = torch.ones(_BANDWIDTH_BYTES // 4, dtype=torch.float32, device=device)
    return _BANDWIDTH_BYTES / statistics.median(_seconds(buffer.sum, device) for _ in range(5))


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _medians(results: Sequence[BenchResult]) -> BenchResult:
    """Of several measurements of one model; the peak is the highest."""
    return BenchResult(
        model=results[0].model,
        prefill_tokens_per_second=statistics.median(r.prefill_tokens_per_second for r in results),
        first_token_seconds=statistics.median(r.first_token_seconds for r in results),
        decode_tokens_per_second=statistics.median(r.decode_tokens_per_second for r in results),
        peak_bytes=max(r.peak_bytes for r in results),
        bytes_per_token=results[0].bytes_per_token,
        bandwidth=statistics.median(r.bandwidth for r in results),
        notes=results[0].notes,
    )
