"""What flows into blocks and layers: calls by length, blocks that return tuples, shared inputs, passes cut short."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from quantkit.capture import BlockInputs, Measurement
from quantkit.checkpoint import Checkpoint
from quantkit.errors import CalibrationError
from quantkit.skeleton import Skeleton, assign, open_skeleton
from quantkit.stats import Stat


def materialized(path: Path) -> Skeleton:
    checkpoint = Checkpoint(path)
    skeleton = open_skeleton(checkpoint, torch.float32)
    tensors = checkpoint.read(checkpoint.tensors)
    assign(skeleton.model, {name: tensors[disk] for name, disk in skeleton.disk_names.items()})
    skeleton.model.tie_weights()
    return skeleton


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_block_by_block_equals_the_model(family: str, tiny: Callable[[str], Path]) -> None:
    """Running the captured calls one block after the other gives the hidden states of the whole model, bit for bit."""
    skeleton, inputs = materialized(tiny(family)), BlockInputs()
    model = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32).eval()
    outputs: list[Tensor] = []
    for block in model.get_submodule(skeleton.block_path).children():
        block.register_forward_hook(lambda *a: outputs.append(a[2][0] if isinstance(a[2], tuple) else a[2]))
    for length in (40, 17, 40):
        ids = torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(length))
        outputs.clear()
        model(input_ids=ids, use_cache=False)
        hidden = inputs.first_hidden(skeleton, ids)
        for index, expected in enumerate(outputs):
            hidden = inputs.run(skeleton, index, hidden)
            assert torch.equal(hidden, expected)
    assert sorted(inputs.calls) == [17, 40]


class _TupleBlock(nn.Module):
    """A block in the style of older model code: it returns a tuple."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return self.block(*args, **kwargs), None


@torch.no_grad()
def test_blocks_that_return_tuples(tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Model code that takes element 0 of a block's output is recognized, and every block's call is recorded."""
    skeleton = materialized(tiny("llama"))
    ids = torch.arange(3, 20)[None]
    plain = BlockInputs()
    expected = plain.first_hidden(skeleton, ids)
    base = skeleton.model.get_submodule("model")
    holder = skeleton.model.get_submodule(skeleton.block_path)
    wrapped = tuple(_TupleBlock(block) for block in skeleton.blocks)
    for index, block in enumerate(wrapped):
        holder._modules[str(index)] = block

    def forward(input_ids: Tensor, **_: Any) -> Tensor:
        hidden = base.get_submodule("embed_tokens")(input_ids)
        for block in holder.children():
            hidden = block(hidden, position_embeddings=plain.calls[17][0].kwargs["position_embeddings"])[0]
        return hidden  # type: ignore[no-any-return]

    monkeypatch.setattr(skeleton.model, "forward", forward)
    inputs = BlockInputs()
    older = replace(skeleton, blocks=wrapped)
    assert torch.equal(inputs.first_hidden(older, ids), expected)
    assert len(inputs.calls[17]) == 3
    assert inputs.run(older, 0, expected).shape == expected.shape


class _Attention(nn.Module):
    """q and k read one tensor, v a view of it, o something else; ``idle`` is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o, self.idle = (nn.Linear(8, 8, bias=i != 1) for i in range(5))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.o(self.q(x) + self.k(x) + self.v(x.view(1, -1, 8)))
        return y


def measured(block: _Attention, names: Sequence[str], batches: list[Tensor]) -> Measurement:
    found = Measurement({n: getattr(block, n) for n in names}, frozenset({Stat.HESSIAN}))
    with torch.no_grad(), found.hooked():
        for batch in batches:
            with found.one_pass():
                block(batch)
    return found


def test_shared_inputs_and_statistics() -> None:
    block, batches = _Attention(), [torch.randn(1, 5, 8), torch.randn(1, 3, 8)]
    found = measured(block, "qkvo", batches)
    assert found.groups() == [["q", "k", "v"], ["o"]]
    x = torch.cat(batches, 1)[0]
    torch.testing.assert_close(found.inputs["v"].hessian, 2 / 8 * x.T @ x)
    assert found.inputs["q"].num_tokens == 8


def test_measuring_changes_nothing() -> None:
    block, x = _Attention(), torch.randn(1, 5, 8)
    with torch.no_grad():
        before = block(x)
        found = Measurement({n: getattr(block, n) for n in "qkvo"}, frozenset({Stat.HESSIAN}))
        with found.hooked():
            assert torch.equal(block(x), before)
        assert torch.equal(block(x), before)
    assert found.inputs["q"].num_tokens == 5  # the second pass was not hooked


class _Gated(nn.Module):
    """An expert runs where the input's sum is positive, after the layer that always runs or before it; then a tail."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.expert, self.tail = (nn.Linear(4, 4) for _ in range(3))
        self.ended: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.ended.append(False)
        y: Tensor = self.always(x)
        if float(x.sum()) > 0:
            y = y + self.expert(x + 1)
        self.ended[-1] = True
        tail: Tensor = self.tail(y)
        return tail


def test_passes_end_where_nothing_more_is_measured() -> None:
    """The first is whole; then each ends at its last layer's input. Everything is measured all the same."""
    block = _Gated()
    found = Measurement({"always": block.always, "expert": block.expert}, frozenset({Stat.HESSIAN}))
    ones = torch.ones(1, 3, 4)
    with torch.no_grad(), found.hooked():
        for x in (ones, ones, -ones, ones, ones):
            with found.one_pass():
                block(x)
        with found.one_pass(whole=True):
            block(ones)
    assert block.ended == [True, False, True, True, False, True]  # one that skips the expert is whole, and the next too
    assert found.inputs["always"].num_tokens == 18
    assert found.inputs["expert"].num_tokens == 15


def test_drift_pairs_each_pass_with_its_reference() -> None:
    """The reference pass is not measured itself; what it gave each layer meets the measured pass that follows."""
    block, pairs = _Attention(), [(torch.randn(1, n, 8), torch.randn(1, n, 8)) for n in (5, 3)]
    found = Measurement({n: getattr(block, n) for n in "qkvo"}, frozenset({Stat.HESSIAN, Stat.DRIFT}))
    with torch.no_grad(), found.hooked():
        for reference, x in pairs:
            with found.of_reference():
                block(reference)
            with found.one_pass():
                block(x)
    assert found.groups() == [["q", "k", "v"], ["o"]]
    exact, x = (torch.cat([pair[i] for pair in pairs], 1)[0] for i in (0, 1))
    assert found.inputs["k"].num_tokens == 8
    torch.testing.assert_close(found.inputs["k"].hessian, 2 / 8 * x.T @ x)
    torch.testing.assert_close(found.inputs["k"].drift, 2 / 8 * (exact - x).T @ x)


def test_reference_passes_end_early_where_their_output_is_not_wanted() -> None:
    block, x = _Gated(), torch.ones(1, 3, 4)
    found = Measurement({"always": block.always}, frozenset({Stat.HESSIAN, Stat.DRIFT}))
    with torch.no_grad(), found.hooked():
        for whole in (False, False, True):
            with found.of_reference(whole):
                block(x + 2)
            with found.one_pass():
                block(x)
    assert block.ended == [True, True, False, False, True, False]  # of the first sample all is run
    torch.testing.assert_close(found.inputs["always"].drift, 2 / 9 * 9 * 2 * torch.ones(4, 4))


def test_a_layer_that_never_runs() -> None:
    found = measured(_Attention(), ("q", "idle"), [torch.randn(1, 2, 8)])
    with pytest.raises(CalibrationError, match="idle: never ran"):
        found.groups()
