"""What flows into the decoder blocks and into the layers inside of them.

The hidden states are captured in front of the first block. All other arguments of a block (masks, position embeddings)
depend on its place and on the sequence length only, and differ between blocks in families with sliding windows; they
are recorded for every block from one pass of the model in which each block hands its input on unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import CalibrationError, CheckpointError, message
from quantkit.precision import forward_products
from quantkit.skeleton import Skeleton
from quantkit.stats import LayerStats, Stat


@dataclass(frozen=True, slots=True)
class BlockCall:
    """A block's arguments besides the hidden states, which come first or under their keyword."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_keyword: bool

    def run(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """The block's output hidden states, of the shape of ``hidden``."""
        if self.by_keyword:
            output = block(*self.args, hidden_states=hidden, **self.kwargs)
        else:
            output = block(hidden, *self.args, **self.kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result


class _Stop(Exception):  # noqa: N818 - not an error: it ends a forward pass early
    """Nothing after this point of the forward pass is needed."""


class _ReturnsTuple(Exception):  # noqa: N818
    """The model takes element 0 of what a block returns."""


class _Recorder(nn.Module):
    """Stands in a block's place and lets a recording answer its calls."""

    def __init__(self, block: nn.Module, recording: _Recording | _Finished, index: int) -> None:
        super().__init__()
        object.__setattr__(self, "_stands_for", block)  # not as a submodule
        self._recording, self._index = recording, index

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # model code reads plain attributes of its blocks, such as attention_type
            return getattr(self.__dict__["_stands_for"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._recording.seen(self._index, args, kwargs)


@dataclass
class _Recording:
    """One forward pass through recorders; ``first_only`` stops in front of the first block."""

    num_blocks: int
    first_only: bool
    as_tuple: bool
    hidden: Tensor | None = None
    calls: list[BlockCall] = field(default_factory=list)

    def seen(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        by_keyword = not args
        hidden = kwargs["hidden_states"] if by_keyword else args[0]
        if self.hidden is None:
            self.hidden = hidden
        elif hidden.shape != self.hidden.shape:
            raise _ReturnsTuple
        rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
        self.calls.append(BlockCall(() if by_keyword else args[1:], rest, by_keyword))
        if self.first_only or index == self.num_blocks - 1:
            raise _Stop
        return (hidden,) if self.as_tuple else hidden


@dataclass(frozen=True)
class _Finished:
    """A forward pass whose blocks are done: what follows them sees ``hidden``, whatever comes before them."""

    hidden: Tensor
    as_tuple: bool

    def seen(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ARG002
        return (self.hidden,) if self.as_tuple else self.hidden


@dataclass
class BlockInputs:
    """Every block's calls, by sequence length; filled while the first hidden states are captured.

    Attributes:
        calls: sequence length -> the call of each block.
        as_tuple: whether the model takes element 0 of what a block returns.
    """

    calls: dict[int, list[BlockCall]] = field(default_factory=dict)
    as_tuple: bool = False

    def first_hidden(self, skeleton: Skeleton, tokens: Tensor) -> Tensor:
        """The hidden states that enter block 0.

        Args:
            skeleton: all parameters outside of the blocks must be materialized.
            tokens: int64 [1, length], on the model's device.

        Returns:
            [1, length, hidden].
        """
        length = int(tokens.shape[1])
        first_only = length in self.calls
        try:
            recording = _record(skeleton, tokens, first_only, self.as_tuple)
        except _ReturnsTuple:
            self.as_tuple = True
            recording = _record(skeleton, tokens, first_only, self.as_tuple)
        if recording.hidden is None:
            raise CheckpointError(
                message(skeleton.block_path, "the model never calls its blocks", "quantkit cannot run it")
            )
        if not first_only:
            self.calls[length] = recording.calls
        return recording.hidden

    def run(
        self, skeleton: Skeleton, index: int, hidden: Tensor, parameters: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The output of block ``index`` for ``hidden`` [1, length, hidden].

        Args:
            skeleton: the block must be materialized.
            index: of the block.
            hidden: what goes in.
            parameters: name within the block -> what stands in for that parameter, which gradients flow to.
        """
        block = skeleton.blocks[index]
        call = self.calls[int(hidden.shape[1])][index]
        with forward_products(hidden.device):
            return call.run(block if parameters is None else _WithParameters(block, parameters), hidden)

    def finish(self, skeleton: Skeleton, tokens: Tensor, hidden: Tensor) -> Tensor:
        """What the model makes of the last block's output: the logits.

        Args:
            skeleton: all parameters outside of the blocks must be materialized.
            tokens: int64 [1, length], on the model's device.
            hidden: [1, length, hidden], the output of the last block for these tokens.

        Returns:
            [1, length, vocabulary].
        """
        with forward_products(hidden.device), _replaced_blocks(skeleton, _Finished(hidden, self.as_tuple)):
            logits: Tensor = skeleton.model(input_ids=tokens, use_cache=False).logits
        return logits

    def head_input(self, skeleton: Skeleton, tokens: Tensor, hidden: Tensor, head: nn.Module) -> Tensor:
        """What the output head reads, [1, length, in], for the last block's output; see :meth:`finish`.

        The head itself does not run and need not be materialized.
        """
        seen: list[Tensor] = []

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0])
            raise _Stop

        handle = head.register_forward_pre_hook(hook)
        try:
            with suppress(_Stop):
                self.finish(skeleton, tokens, hidden)
        finally:
            handle.remove()
        return seen[0]


@dataclass(frozen=True, slots=True)
class _WithParameters:
    """A module that is called with other tensors in place of some of its parameters; it is not changed."""

    module: nn.Module
    parameters: Mapping[str, Tensor]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(self.module, dict(self.parameters), args, kwargs)


def _record(skeleton: Skeleton, tokens: Tensor, first_only: bool, as_tuple: bool) -> _Recording:
    recording = _Recording(len(skeleton.blocks), first_only, as_tuple)
    with _replaced_blocks(skeleton, recording), suppress(_Stop):
        skeleton.model(input_ids=tokens, use_cache=False)
    return recording


@contextmanager
def _replaced_blocks(skeleton: Skeleton, recording: _Recording | _Finished) -> Iterator[None]:
    holder = skeleton.model.get_submodule(skeleton.block_path)
    for index, block in enumerate(skeleton.blocks):
        holder._modules[str(index)] = _Recorder(block, recording, index)
    try:
        yield
    finally:
        for index, block in enumerate(skeleton.blocks):
            holder._modules[str(index)] = block


class Measurement:
    """Statistics of a block's linear layers, gathered by hooks while the block runs.

    Layers that are called with the same tensor share one :class:`LayerStats`. Where the drift is asked for, every
    pass is preceded by one of the same sample's full-precision hidden states, in :meth:`of_reference`.

    Attributes:
        inputs: layer -> the statistics of its input.
    """

    def __init__(self, linears: Mapping[str, nn.Module], needs: frozenset[Stat]) -> None:
        self.inputs: dict[str, LayerStats] = {}
        self._linears, self._needs = linears, needs
        self._leaders: dict[str, bool] = {}
        self._live: list[tuple[Tensor, str]] = []  # inputs of the first pass, held so that no address is used twice
        self._references: dict[str, Tensor] = {}  # what the full-precision pass gave each layer
        self._is_reference = False
        self._calls = dict.fromkeys(linears, 0)  # in this pass
        self._calls_each_once = False  # as the first pass did
        self._may_stop = False

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Gather statistics from every forward pass inside."""
        handles = []
        for name, module in self._linears.items():
            handles.append(module.register_forward_pre_hook(self._hook(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def of_reference(self, whole: bool = True) -> Iterator[None]:
        """The pass inside is the full-precision model's: its inputs are kept for the measured pass that follows.

        Unless ``whole`` it ends where :meth:`one_pass` does.
        """
        self._is_reference, self._may_stop = True, self._calls_each_once and not whole
        try:
            with suppress(_Stop):
                yield
        finally:
            self._is_reference = False

    @contextmanager
    def one_pass(self, whole: bool = False) -> Iterator[None]:
        """The measured forward pass of one sample is inside. Who shares an input with whom is known from the first on.

        A pass ends where the last layer's input is known, for nothing after it is measured: unless ``whole``, and but
        for the first. After a pass that did not call each layer once the next one is run to its end.
        """
        self._may_stop = self._calls_each_once and not whole
        with suppress(_Stop):
            yield
        self._calls_each_once = all(count == 1 for count in self._calls.values())
        self._calls = dict.fromkeys(self._calls, 0)
        self._live.clear()
        self._references.clear()

    def groups(self) -> list[list[str]]:
        """Layers by shared input, in the order in which they first ran.

        Raises:
            CalibrationError: a layer that never ran.
        """
        idle = [name for name in self._linears if name not in self.inputs]
        if idle:
            raise CalibrationError(
                message(
                    idle[0],
                    "never ran on the calibration data",
                    "give it method rtn or skip it by a rule in the recipe",
                )
            )
        by_stats: dict[int, list[str]] = {}
        for name, stats in self.inputs.items():
            by_stats.setdefault(id(stats), []).append(name)
        return list(by_stats.values())

    def _hook(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if self._is_reference:
                self._references[name] = x
                if self._may_stop and len(self._references) == len(self._linears):
                    raise _Stop
                return
            if name not in self.inputs:
                leader = next((other for tensor, other in self._live if _same(tensor, x)), None)
                self._leaders[name] = leader is None
                self.inputs[name] = self.inputs[leader] if leader else LayerStats(x.shape[-1], self._needs, x.device)
                self._live.append((x, name))
            if self._leaders[name]:
                self.inputs[name].update(x, self._references.get(name))
            self._calls[name] += 1
            if self._may_stop and all(self._calls.values()):
                raise _Stop

        return hook


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (
        a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
    )
