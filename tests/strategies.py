"""What tests draw and measure: quantization schemes, quantized weights, and the error of a product.

`weights()` is the hypothesis strategy; `random_weight()` is the same thing with the parameters given.
"""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import QuantScheme

SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@st.composite
def schemes(
    draw: st.DrawFn,
    *,
    bits: st.SearchStrategy[int] = st.integers(2, 8),  # noqa: B008
    group_sizes: st.SearchStrategy[int | None] = st.sampled_from((None, 1, 8, 20, 32, 128)),  # noqa: B008
    symmetric: st.SearchStrategy[bool] = st.booleans(),  # noqa: B008
) -> QuantScheme:
    return QuantScheme(draw(bits), draw(group_sizes), symmetric=draw(symmetric))


@st.composite
def weights(
    draw: st.DrawFn,
    scheme: st.SearchStrategy[QuantScheme] | None = None,
    *,
    out_features: st.SearchStrategy[int] = st.integers(1, 80),  # noqa: B008
    groups: st.SearchStrategy[int] = st.integers(1, 4),  # noqa: B008
    channel_columns: st.SearchStrategy[int] = st.integers(1, 100),  # noqa: B008
    scale_dtypes: tuple[torch.dtype, ...] = SCALE_DTYPES,
    act_order: st.SearchStrategy[bool] = st.just(False),  # noqa: B008
) -> QuantizedTensor:
    """A weight with any codes, scales of both signs and any zero points that its scheme allows.

    Its in_features are `groups` times the group size, or `channel_columns` where there is one scale per channel.
    """
    chosen = draw(schemes() if scheme is None else scheme)
    columns = draw(channel_columns) if chosen.group_size is None else draw(groups) * chosen.group_size
    return random_weight(
        chosen,
        draw(out_features),
        columns,
        seed=draw(st.integers(0, 2**31)),
        dtype=draw(st.sampled_from(scale_dtypes)),
        act_order=draw(act_order),
    )


def random_weight(
    scheme: QuantScheme,
    out_features: int,
    in_features: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    act_order: bool = False,
) -> QuantizedTensor:
    """Uniform codes and zero points; scales from 0.01 to 0.02, every eighth of them negative."""
    random = torch.Generator().manual_seed(seed)
    shape = (out_features, scheme.num_groups(in_features))
    sign = torch.where(torch.rand(shape, generator=random) < 1 / 8, -1.0, 1.0)
    scale = (0.01 + 0.01 * torch.rand(shape, generator=random)) * sign
    if scheme.symmetric:
        zero_point = torch.full(shape, scheme.mid, dtype=torch.uint8)
    else:
        zero_point = torch.randint(scheme.levels, shape, generator=random, dtype=torch.uint8)
    codes = torch.randint(scheme.levels, (out_features, in_features), generator=random, dtype=torch.uint8)
    group = torch.arange(in_features, dtype=torch.int32) // scheme.columns_per_group(in_features)
    g_idx = group[torch.randperm(in_features, generator=random)] if act_order else None
    act_scale = 2.0**-6 if scheme.act_static else None
    return QuantizedTensor(codes, scale.to(dtype), zero_point, scheme, g_idx, act_scale)


def quantized_activations(x: Tensor, act_scale: float | None) -> tuple[Tensor, Tensor]:
    """Codes int64 [..., in] and scales float32 [..., 1] of activations, written from the definition.

    The division is in float32, as everywhere: in float64 it would round values that lie half-way differently.
    """
    real = x.to(torch.promote_types(x.dtype, torch.float32))
    if act_scale is None:
        scale = real.abs().max(-1, keepdim=True).values / 127.5
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    else:
        scale = torch.full_like(real[..., :1], act_scale)
    return (real / scale).round().clamp(-128, 127).long(), scale


def exact_weight(q: QuantizedTensor) -> Tensor:
    """float64 [out, in], written from the definition, not with the code under test."""
    index = q.g_idx
    if index is None:
        index = torch.arange(q.in_features) // q.scheme.columns_per_group(q.in_features)
    index = index.long()
    return q.scale.double()[:, index] * (q.codes.double() - q.zero_point.double()[:, index])


def assert_same(a: QuantizedTensor, b: QuantizedTensor) -> None:
    """Equal bit for bit."""
    assert a.scheme == b.scheme
    assert a.scale.dtype == b.scale.dtype
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scale, b.scale)
    assert torch.equal(a.zero_point, b.zero_point)
    assert a.act_scale == b.act_scale
    assert (a.g_idx is None) == (b.g_idx is None)
    assert a.g_idx is None or b.g_idx is None or torch.equal(a.g_idx, b.g_idx)


def error_ratio(y: Tensor, x: Tensor, q: QuantizedTensor) -> float:
    """How wrong `y` is as `x @ Wᵀ`, over how wrong torch's own product with the rounded dense weight is.

    The error is the root mean square over all elements, against the product in float64. The largest element is no
    measure: by luck it differs by more than two between two products that round equally often.
    """
    weight = exact_weight(q)
    exact = x.double() @ weight.T
    torchs = torch.nn.functional.linear(x, weight.to(x.dtype)).double()
    return float((y.double() - exact).norm() / (torchs - exact).norm())
