from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import BF16, Conv1D, dense, fastest_cpu, normal
from strategies import assert_same, random_weight, schemes, weights
from torch import Tensor, nn

from quantkit.errors import InputError, KernelError, SchemeError
from quantkit.grid import dequantize
from quantkit.linear import QuantLinear
from quantkit.qtensor import QuantizedTensor
from quantkit.replacing import replace_linears
from quantkit.scheme import QuantScheme


class TestProduct:
    @settings(max_examples=40, deadline=None)
    @given(
        weights(schemes(group_sizes=st.sampled_from((None, 8, 32, 64))), act_order=st.booleans()),
        st.sampled_from([torch.float16, BF16, torch.float32, torch.float64]),
        st.booleans(),
        st.lists(st.integers(0, 4), max_size=2),
    )
    def test_is_that_of_the_dense_layer(
        self, q: QuantizedTensor, dtype: torch.dtype, bias: bool, batch: list[int]
    ) -> None:
        b = normal(q.out_features).to(dtype) if bias else None
        layer = QuantLinear.from_quantized(q, b, dtype=dtype)
        x = normal(*batch, q.in_features).to(dtype)
        y = layer(x)
        exact = x.double() @ dequantize(q, torch.float64).T + (0 if b is None else b.double())
        assert y.dtype == dtype
        assert y.shape == exact.shape
        size = x.double().abs() @ dequantize(q, torch.float64).abs().T + exact.abs()
        assert bool(((y.double() - exact).abs() <= 3 * torch.finfo(dtype).eps * size).all())
        assert_same(layer.quantized(), q)

    @pytest.mark.parametrize("scheme", ["w4a16_g64", "w4a16_g64_asym", "w8a16", "w3a16_g16"])
    @pytest.mark.parametrize("dtype", [BF16, torch.float64])
    def test_gradient_of_x(self, scheme: str, dtype: torch.dtype) -> None:
        layer = QuantLinear.from_linear(dense(128, 48, dtype=dtype), scheme)
        x = normal(2, 3, 128).to(dtype).requires_grad_()
        grad = normal(2, 3, 48, seed=3).to(dtype)
        layer(x).backward(grad)
        expected = grad.double() @ dequantize(layer.quantized(), torch.float64)
        assert x.grad is not None
        assert x.grad.dtype == dtype
        torch.testing.assert_close(x.grad.double(), expected, rtol=2e-2, atol=2e-2)
        assert not any(p.requires_grad for p in layer.parameters())

    def test_gradient_over_several_blocks_of_rows(self) -> None:
        layer = QuantLinear(random_weight(QuantScheme(4, 64), 2112, 1024), dtype=BF16)
        x = normal(2, 1024).to(BF16).requires_grad_()
        layer(x).sum().backward()
        expected = dequantize(layer.quantized(), torch.float64).sum(0).expand(2, 1024)
        assert x.grad is not None
        assert float((x.grad - expected).norm() / expected.norm()) < 0.01

    def test_gradient_through_a_network(self) -> None:
        net = nn.Sequential(dense(64, 32, dtype=torch.float64), nn.GELU(), dense(32, 16, dtype=torch.float64))
        replace_linears(net, QuantScheme(4, 16))
        x = normal(3, 64).double().requires_grad_()
        assert torch.autograd.gradcheck(net, (x,))

    def test_no_graph_without_a_gradient(self) -> None:
        layer = QuantLinear.from_linear(dense(128, 48), "w4a16_g64")
        assert layer(normal(2, 128).to(BF16)).grad_fn is None
        with torch.no_grad():
            assert layer(normal(2, 128).to(BF16).requires_grad_()).grad_fn is None
        with torch.inference_mode():
            assert layer(normal(2, 128).to(BF16)).shape == (2, 48)

    @pytest.mark.parametrize(
        ("x", "reason"),
        [
            (torch.ones(2, 128), r"x is torch.float32, the layer torch.bfloat16; call .to\(torch.bfloat16\)"),
            (torch.ones(2, 128, dtype=torch.int64), "x is torch.int64"),
            (torch.ones(2, 64, dtype=BF16), r"x is \[2, 64\]; the layer takes \[..., 128\]"),
            (torch.tensor(1, dtype=BF16), r"x is \[\]"),
            (torch.ones(2, 128, dtype=BF16, device="meta"), "x is on meta, the layer on cpu"),
        ],
    )
    def test_bad_input(self, x: Tensor, reason: str) -> None:
        layer = QuantLinear.from_linear(dense(128, 48), "w4a16_g64")
        with pytest.raises(KernelError, match=reason) as caught:
            layer(x)
        assert "\n" not in str(caught.value)


class TestFromLinear:
    @pytest.mark.parametrize("dtype", [torch.float16, BF16, torch.float32, torch.float64])
    def test_rounds_to_nearest(self, dtype: torch.dtype) -> None:
        linear = dense(96, 40, dtype=dtype)
        layer = QuantLinear.from_linear(linear, QuantScheme(4, 32, symmetric=False))
        scale_dtype = torch.float32 if dtype == torch.float64 else dtype
        assert layer.quantized().scale.dtype == scale_dtype
        assert layer.weight.dtype == dtype
        step = layer.quantized().scale.double().repeat_interleave(32, 1)
        error = (layer.weight.double() - linear.weight.double()).abs()
        assert bool((error <= step * 0.51 + 0.01 * linear.weight.double().abs()).all())
        assert layer.bias is not None
        assert torch.equal(layer.bias, linear.bias)

    def test_sizes_and_names(self) -> None:
        layer = QuantLinear.from_linear(dense(128, 48, bias=False), "w4a16_g64_asym")
        assert (layer.in_features, layer.out_features, layer.bias) == (128, 48, None)
        assert layer.scheme == QuantScheme(4, 64, symmetric=False)
        assert layer.backend == fastest_cpu()
        shown = "in_features=128, out_features=48, bias=False, scheme=w4a16_g64_asym, dtype=bfloat16"
        assert shown in repr(layer)
        assert list(layer.parameters()) == []
        named = QuantLinear.from_linear(dense(128, 48), "w4a16_g64", backend="reference")
        assert named.backend == "reference"

    def test_keeps_the_mode(self) -> None:
        assert not QuantLinear.from_linear(dense(128, 48).eval(), "w8a16").training

    def test_conv1d(self) -> None:
        conv = Conv1D(48, 128)
        layer = QuantLinear.from_linear(conv, "w8a16")
        assert (layer.in_features, layer.out_features) == (128, 48)
        x = normal(5, 128)
        torch.testing.assert_close(layer(x), conv(x), rtol=0.02, atol=0.3)

    def test_conv1d_of_transformers(self) -> None:
        from transformers.pytorch_utils import Conv1D as TheirConv1D

        layer = QuantLinear.from_linear(TheirConv1D(48, 128), "w8a16")
        assert (layer.in_features, layer.out_features) == (128, 48)

    def test_refusals(self) -> None:
        with pytest.raises(InputError, match="Embedding is not a linear layer"):
            QuantLinear.from_linear(nn.Embedding(3, 4), "w8a16")
        with pytest.raises(SchemeError, match="in_features=100 is not a multiple of group_size=64"):
            QuantLinear.from_linear(dense(100, 48), QuantScheme(4, 64))
        with pytest.raises(KernelError, match="meta"):
            QuantLinear.from_linear(nn.Linear(128, 48, device="meta"), "w8a16")
        with pytest.raises(KernelError, match="cpu refuses activations of torch"):
            QuantLinear.from_linear(dense(128, 48, dtype=torch.float32), "w8a16", backend="cpu")
        with pytest.raises(InputError, match=r"bias is \[3\]"):
            QuantLinear(random_weight(QuantScheme(4, 64), 48, 128), torch.zeros(3), dtype=BF16)


class TestMemory:
    @pytest.mark.parametrize("backend", ["cpu", "reference"])
    @pytest.mark.parametrize("scheme", ["w4a16_g128", "w8a16"])
    def test_a_module_is_as_large_as_its_bits(self, scheme: str, backend: str) -> None:
        layer = QuantLinear.from_linear(dense(1024, 512, bias=False), scheme, backend=backend)
        layer(normal(2, 1024).to(BF16))
        bits = sum(b.untyped_storage().nbytes() for b in layer.buffers()) * 8 / (1024 * 512)
        assert layer.scheme.bits <= bits <= layer.scheme.bits + 0.26
        # Nothing else is kept anywhere in the object.
        held = [value for value in vars(layer).values() if isinstance(value, Tensor)]
        assert held == []


class TestMoving:
    Q = random_weight(QuantScheme(4, 64, symmetric=False), 48, 128, dtype=torch.float16)

    def layer(self, backend: str | None = None) -> QuantLinear:
        return QuantLinear(self.Q, normal(48), dtype=BF16, backend=backend)

    @pytest.mark.parametrize(
        ("move", "dtype", "backend"),
        [
            (lambda m: m.half(), torch.float16, fastest_cpu(dtype=torch.float16)),
            (lambda m: m.float(), torch.float32, fastest_cpu(dtype=torch.float32)),
            (lambda m: m.double(), torch.float64, "reference"),
            (lambda m: m.float().bfloat16(), BF16, fastest_cpu()),
            (lambda m: m.to(torch.float16), torch.float16, fastest_cpu(dtype=torch.float16)),
            (lambda m: m.to("cpu"), BF16, fastest_cpu()),
            (lambda m: m.to("cpu", torch.float32), torch.float32, fastest_cpu(dtype=torch.float32)),
            (lambda m: m.type(torch.float32), torch.float32, fastest_cpu(dtype=torch.float32)),
            (lambda m: m.share_memory(), BF16, fastest_cpu()),
        ],
    )
    def test_keeps_codes_and_scales(
        self, move: Callable[[nn.Module], nn.Module], dtype: torch.dtype, backend: str
    ) -> None:
        net = nn.Sequential(self.layer())
        layer = move(net)[0]  # type: ignore[index]
        assert_same(layer.quantized(), self.Q)
        assert (layer.spec.dtype, layer.bias.dtype, layer.backend) == (dtype, dtype, backend)
        assert layer(normal(2, 128).to(dtype)).dtype == dtype

    def test_a_named_backend_is_not_given_up(self) -> None:
        assert self.layer("reference").float().bfloat16().backend == "reference"
        layer = self.layer("cpu")
        with pytest.raises(KernelError, match="cpu refuses"):
            layer.float()
        assert_same(layer.quantized(), self.Q)
        assert layer(normal(2, 128).to(BF16)).dtype == BF16

    def test_meta_holds_nothing(self) -> None:
        with pytest.raises(KernelError, match="meta"):
            self.layer().to("meta")

    def test_deepcopy(self) -> None:
        net = nn.Sequential(self.layer())
        twin = copy.deepcopy(net)
        x = normal(2, 128).to(BF16)
        assert torch.equal(net(x), twin(x))
        ours, theirs = list(net.buffers()), list(twin.buffers())
        assert len(ours) == len(theirs) > 0
        assert not {b.data_ptr() for b in ours} & {b.data_ptr() for b in theirs}


class TestStateDict:
    @pytest.mark.parametrize("source", ["cpu", "reference"])
    @pytest.mark.parametrize("target", ["cpu", "reference"])
    def test_does_not_depend_on_the_backend(self, source: str, target: str) -> None:
        scheme = QuantScheme(4, 64, symmetric=False)
        a, b = (random_weight(scheme, 48, 128, seed=seed, dtype=torch.float16) for seed in (1, 2))
        ours = nn.Sequential(QuantLinear(a, normal(48), dtype=BF16, backend=source))
        theirs = nn.Sequential(QuantLinear(b, torch.zeros(48), dtype=BF16, backend=target))
        state = ours.state_dict()
        assert set(state) == {"0.weight_packed", "0.scale", "0.zero_point", "0.bias"}
        assert state["0.weight_packed"].dtype == torch.int32
        theirs.load_state_dict(state)
        layer = theirs[0]
        assert isinstance(layer, QuantLinear)
        assert layer.backend == target
        assert_same(layer.quantized(), a)
        assert layer.bias is not None
        assert torch.equal(layer.bias, normal(48).to(BF16))

    def test_g_idx(self) -> None:
        a, b = (random_weight(QuantScheme(3, 8), 5, 32, seed=seed, act_order=True) for seed in (1, 2))
        layer = QuantLinear(b, dtype=torch.float32)
        layer.load_state_dict(QuantLinear(a, dtype=torch.float32).state_dict())
        assert_same(layer.quantized(), a)

    def test_errors(self) -> None:
        layer = QuantLinear.from_linear(dense(128, 48), "w4a16_g64")
        state = layer.state_dict()
        with pytest.raises(RuntimeError, match=r'Missing key.*"scale"'):
            layer.load_state_dict({k: v for k, v in state.items() if k != "scale"})
        with pytest.raises(RuntimeError, match=r'Unexpected key.*"extra"'):
            layer.load_state_dict({**state, "extra": torch.zeros(1)})
        other = QuantLinear.from_linear(dense(128, 48), "w8a16")
        with pytest.raises(RuntimeError, match="packed words must be int32"):
            layer.load_state_dict(other.state_dict())


class TestQuantizedActivations:
    @pytest.mark.parametrize("dtype", [torch.float16, BF16, torch.float32])
    def test_from_linear(self, dtype: torch.dtype) -> None:
        """The error against the dense layer is what half a step in x and in W explains."""
        linear = dense(100, 37, dtype=dtype)
        layer = QuantLinear.from_linear(linear, "w8a8")
        assert layer.backend == "cpu_int8"
        x = normal(3, 5, 100).to(dtype)
        weight = linear.weight.double()
        step_x = x.double().abs().amax(-1, keepdim=True) / 127.5
        step_w = (weight.abs().amax(-1) / 127.5)[None]
        bound = 0.5 * step_x * weight.abs().sum(-1) + 0.5 * step_w * (x.double().abs() + step_x / 2).sum(
            -1, keepdim=True
        )
        error = (layer(x).double() - linear(x).double()).abs()
        assert bool((error <= 1.02 * bound + 4 * torch.finfo(dtype).eps * linear(x).double().abs().amax()).all())
        assert float(error.detach().max()) > 0

    def test_moves_between_dtypes_and_backends(self) -> None:
        layer = QuantLinear.from_linear(dense(96, 24, dtype=torch.float32), "w8a8_asym")
        before = layer.quantized()
        for dtype, backend in ((BF16, "cpu_int8"), (torch.float64, "simulated"), (torch.float32, "cpu_int8")):
            layer = layer.to(dtype)
            assert (layer.backend, layer.spec.dtype) == (backend, dtype)
            assert_same(layer.quantized(), before)
        simulated = QuantLinear(before, dtype=torch.float32, backend="simulated")
        x = normal(4, 96)
        torch.testing.assert_close(QuantLinear(before, dtype=torch.float32)(x), simulated(x), rtol=1e-5, atol=1e-4)

    def test_groups_are_simulated_and_say_so(self) -> None:
        assert "backend=simulated" in repr(QuantLinear.from_linear(dense(96, 24), "w8a8_g32"))

    @pytest.mark.parametrize("columns", [33, 36])
    @pytest.mark.parametrize("static", [True, False])
    def test_state_dict_pickle_and_copy(self, static: bool, columns: int) -> None:
        """oneDNN's packed weight has no storage to copy, others hold addresses: the portable form is what travels."""
        q = random_weight(QuantScheme(8, None, act_bits=8, act_static=static), 24, columns)
        layer = QuantLinear(q, normal(24), dtype=torch.float32)
        state = layer.state_dict()
        assert ("act_scale" in state) == static
        x = normal(4, columns)
        other = QuantLinear(replace(q, codes=q.codes.flip(0)), torch.zeros(24), dtype=torch.float32)
        other.load_state_dict(state)
        file = io.BytesIO()
        torch.save(nn.Sequential(layer), file)
        file.seek(0)
        read = torch.load(file, weights_only=False)[0]
        for again in (other, copy.deepcopy(layer), read):
            assert_same(again.quantized(), q)
            assert torch.equal(again(x), layer(x))
            assert again.backend == "cpu_int8"
            assert again.state_dict().keys() == state.keys()
        assert_same(layer.quantized(), q)

    def test_a_copy_of_any_backend_is_whole(self) -> None:
        layer = QuantLinear.from_linear(dense(128, 48).eval(), "w4a16_g64")
        again = copy.deepcopy(layer)
        assert (again.backend, again.training) == (fastest_cpu(), False)
        x = normal(2, 128).to(BF16)
        assert torch.equal(again(x), layer(x))
        assert torch.equal(again.to(torch.float32)(x.float()), layer.to(torch.float32)(x.float()))

    def test_the_gradient_of_x_passes_straight_through(self) -> None:
        layer = QuantLinear.from_linear(dense(96, 24, dtype=torch.float32), "w8a8")
        x = normal(4, 96).requires_grad_()
        grad = normal(4, 24, seed=3)
        y = layer(x)
        y.backward(grad)
        assert x.grad is not None
        torch.testing.assert_close(x.grad, grad @ layer.dequantize(), rtol=1e-5, atol=1e-5)
        assert torch.equal(y.detach(), layer(x.detach()))

    def test_static_activations_need_calibration(self) -> None:
        with pytest.raises(SchemeError, match="static activations need calibration"):
            QuantLinear.from_linear(dense(96, 24), "w8a8_static")
        net = nn.Sequential(dense(96, 24))
        with pytest.raises(SchemeError, match="static activations need calibration"):
            replace_linears(net, "w8a8_static")
        assert isinstance(net[0], nn.Linear)

    def test_replace_linears(self) -> None:
        net = nn.Sequential(dense(64, 33), nn.GELU(), dense(33, 7))
        x = normal(5, 64).to(BF16)
        exact = net(x).double()
        replaced = replace_linears(net, "w8a8")
        assert {layer.backend for layer in replaced.values()} == {"cpu_int8"}
        assert float((net(x).double() - exact).norm() / exact.norm()) < 0.03
