"""Outliers of what flows into a dense model's layers: calibration samples go through one block after the other.

In memory are one block, one sample's activations and the hidden states between blocks, or a file of these.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from quantkit.activations import Activations
from quantkit.capture import BlockInputs
from quantkit.outliers import Outliers, StreamedOutliers
from quantkit.skeleton import Skeleton, assign, place_buffers, release

_BUDGET = 2 * 2**30


@torch.no_grad()
def input_outliers(
    skeleton: Skeleton, samples: Sequence[Tensor], dtype: torch.dtype, progress: Callable[[int, int], None] | None
) -> dict[str, Outliers]:
    """Layer (or module of stacked experts) -> the outliers of its input over all tokens.

    Args:
        skeleton: of a dense model; its blocks are filled and freed one by one.
        samples: int64 [length] each.
        dtype: of the forward passes.
        progress: is told how many blocks of how many are done.
    """
    found: dict[str, Outliers] = {}
    inputs, cpu = BlockInputs(), torch.device("cpu")
    place_buffers(skeleton.model, cpu)
    with tempfile.TemporaryDirectory(prefix="quantkit-") as directory:
        states = _first(skeleton, samples, inputs, dtype, Path(directory))
        try:
            for index in range(len(skeleton.blocks)):
                watched = _watched(skeleton, index)
                with _block(skeleton, index, dtype), _hooked(watched) as stats:
                    for sample in range(len(states)):
                        states[sample] = inputs.run(skeleton, index, states[sample])
                found.update({name: stream.result() for name, stream in stats.items()})
                if progress is not None:
                    progress(index + 1, len(skeleton.blocks))
        finally:
            states.close()
    return found


def _first(
    skeleton: Skeleton, samples: Sequence[Tensor], inputs: BlockInputs, dtype: torch.dtype, directory: Path
) -> Activations:
    """The hidden states in front of the first block."""
    names = dict(skeleton.outside_tensors())
    for tied, owner in (skeleton.model.all_tied_weights_keys or {}).items():
        names[tied] = skeleton.disk_names[owner]
    assign(skeleton.model, _read(skeleton, names, dtype))
    store: Activations | None = None
    for index, tokens in enumerate(samples):
        state = inputs.first_hidden(skeleton, tokens[None])
        if store is None:
            shapes = [(1, int(sample.numel()), int(state.shape[-1])) for sample in samples]
            store = Activations(shapes, state.dtype, _BUDGET, directory)
        store[index] = state
    release(skeleton.model)
    assert store is not None, "there is at least one sample"
    return store


@contextmanager
def _block(skeleton: Skeleton, index: int, dtype: torch.dtype) -> Iterator[None]:
    block = skeleton.blocks[index]
    assign(block, _read(skeleton, skeleton.block_tensors(index), dtype))
    try:
        yield
    finally:
        release(block)


def _read(skeleton: Skeleton, names: Mapping[str, str], dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = skeleton.checkpoint.read(set(names.values()))
    placed = {disk: t.to(dtype) if t.dtype.is_floating_point else t for disk, t in tensors.items()}
    return {name: placed[disk] for name, disk in names.items()}


def _watched(skeleton: Skeleton, index: int) -> dict[str, nn.Module]:
    """The linear layers of a block, and its modules of stacked experts."""
    names = [info.name for info in skeleton.linears if info.block == index and info.expert is None]
    prefix = f"{skeleton.block_path}.{index}."
    names += [info.name for info in skeleton.experts if info.name.startswith(prefix)]
    return {name: skeleton.model.get_submodule(name) for name in names}


@contextmanager
def _hooked(watched: Mapping[str, nn.Module]) -> Iterator[dict[str, StreamedOutliers]]:
    stats: dict[str, StreamedOutliers] = {}

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            stats.setdefault(name, StreamedOutliers()).update(args[0] if args else kwargs["hidden_states"])

        return hook

    handles = [module.register_forward_pre_hook(hook_of(name), with_kwargs=True) for name, module in watched.items()]
    try:
        yield stats
    finally:
        for handle in handles:
            handle.remove()
