"""Attention of one token: against float64 on drawn sizes and masks, as an operator of torch's, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import BF16, normal
from torch import Tensor

from quantkit.kernels import attend
from quantkit.kernels.attend import attend_step, attends_here, why_not_attend

pytestmark = pytest.mark.skipif(not attends_here(), reason="the just-in-time kernels do not run on this CPU")

Case = tuple[Tensor, Tensor, Tensor]


def case(
    dtype: torch.dtype, heads: int = 6, shared: int = 2, length: int = 48, size: int = 32, value: int = 16
) -> Case:
    return (
        normal(heads, size).to(dtype).view(1, heads, 1, size),
        normal(shared * length, size).to(dtype).view(1, shared, length, size),
        normal(shared * length, value).to(dtype).view(1, shared, length, value),
    )


def exact(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """float64 [heads, value size], from the positions of the mask alone."""
    groups = q.shape[1] // keys.shape[1]
    kept = [tensor[0].double().repeat_interleave(groups, 0)[:, mask] for tensor in (keys, values)]
    return ((q[0].double() @ kept[0].mT * scale).softmax(-1) @ kept[1])[:, 0]


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from([BF16, torch.float16, torch.float32]),
    shared=st.integers(1, 3),
    groups=st.integers(1, 4),
    blocks=st.integers(1, 6),
    size=st.sampled_from([16, 48, 64, 80, 128]),
    value=st.sampled_from([16, 64, 96]),
    scale=st.sampled_from([0.05, 0.125, 1.0, 30.0]),
    data=st.data(),
)
def test_the_numbers(
    dtype: torch.dtype,
    shared: int,
    groups: int,
    blocks: int,
    size: int,
    value: int,
    scale: float,
    data: st.DataObject,
) -> None:
    """Within the rounding of the result and of float32 sums; positions that are masked may hold anything finite."""
    length = 16 * blocks
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=length, max_size=length)))
    mask[data.draw(st.integers(0, length - 1))] = True
    q, keys, values = case(dtype, shared * groups, shared, length, size, value)
    keys[:, :, ~mask], values[:, :, ~mask] = 1e4, -1e4
    found = attend_step(q, keys, values, mask.view(1, 1, 1, -1), scale)
    assert found.shape == (1, 1, shared * groups, value)
    assert found.dtype == dtype
    wanted = exact(q, keys, values, mask, scale)
    size_of_sums = float((q.double().abs() @ keys[:, :, mask].double().abs().mT.repeat_interleave(groups, 1)).max())
    scores = 1e-6 * scale * size_of_sums  # a score's error is that of its exponential
    bound = (torch.finfo(dtype).eps + 2e-6 + scores) * values[:, :, mask].double().abs().max()
    assert float((found[0, 0].double() - wanted).abs().max()) <= float(bound)


def test_one_position_is_its_value() -> None:
    q, keys, values = case(BF16)
    mask = torch.arange(48) == 21
    found = attend_step(q, keys, values, mask, 0.2)[0, 0]
    assert torch.equal(found, values[0, :, 21].repeat_interleave(3, 0))


def test_scores_beyond_float32s_exponentials() -> None:
    """The greatest score decides, whichever block it is in."""
    q, keys, values = torch.ones(1, 1, 1, 16), torch.zeros(1, 1, 48, 16), normal(48, 16).view(1, 1, 48, 16)
    for place, score in ((3, 50.0), (20, 4000.0), (40, -4000.0)):
        keys[0, 0, place, 0] = score
    found = attend_step(q, keys, values, torch.ones(48, dtype=torch.bool), 1.0)
    assert torch.equal(found[0, 0, 0], values[0, 0, 20])


def test_threads_do_not_change_them() -> None:
    q, keys, values = case(BF16, 8, 4, 4096, 64, 64)
    mask, before, found = torch.arange(4096) < 4000, torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(attend_step(q, keys, values, mask, 0.125))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_torch_takes_it_as_an_operator() -> None:
    mask = torch.arange(48) < 5
    torch.library.opcheck(torch.ops.quantkit.attend_step.default, (*case(BF16), mask, 0.2))


def test_a_wrong_one_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend, "attend_step", lambda q, _keys, values, _mask, _scale: values[:, :1, :4] + q.sum())
    attend._tested.cache_clear()
    with pytest.warns(UserWarning, match="attend_step is wrong"):
        assert not attends_here()
    monkeypatch.undo()
    attend._tested.cache_clear()
    assert attends_here()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"heads": 5}, "one token"),
        ({"length": 40}, "multiples of 16"),
        ({"size": 24}, "multiples of 16"),
        ({"value": 2048}, "above 1024"),
    ],
)
def test_sizes_that_it_refuses(change: dict[str, int], what: str) -> None:
    q, keys, values = case(BF16, **change)
    mask = torch.ones(keys.shape[2], dtype=torch.bool)
    assert what in str(why_not_attend(q, keys, values, mask))


def test_what_else_it_refuses() -> None:
    q, keys, values = case(BF16)
    mask = torch.ones(48, dtype=torch.bool)
    assert why_not_attend(q, keys, values, mask) is None
    assert "one token" in str(why_not_attend(q.expand(1, 6, 2, 32), keys, values, mask))
    assert "no mask" in str(why_not_attend(q, keys, values, None))
    assert "no mask" in str(why_not_attend(q, keys, values, mask.expand(6, 48)))
    assert "no mask" in str(why_not_attend(q, keys, values, mask.to(BF16)))
    assert "one floating-point type" in str(why_not_attend(q.float(), keys, values, mask))
