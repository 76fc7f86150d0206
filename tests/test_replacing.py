from __future__ import annotations

import pytest
import torch
from layers import Conv1D, dense, fastest_cpu, normal
from strategies import assert_same
from torch import Tensor, nn

from quantkit.errors import InputError, KernelError, SchemeError
from quantkit.grid import quantize_groups
from quantkit.linear import QuantLinear
from quantkit.replacing import replace_linears
from quantkit.scheme import QuantScheme


class Mlp(nn.Module):
    """An ordinary torch module, with names, a tied head and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.up = dense(64, 128, dtype=torch.float32)
        self.down = nn.ModuleDict({"a": dense(128, 64, dtype=torch.float32)})
        self.down["b"] = self.down["a"]
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.down["a"](torch.relu(self.up(x)))
        x = x + self.down["b"](torch.relu(self.up(x)))
        return self.head(self.norm(x))  # type: ignore[no-any-return]


class TestReplaceLinears:
    def test_an_ordinary_model(self) -> None:
        model, tokens = Mlp(), torch.arange(20).view(2, 10)
        with torch.no_grad():
            before = model(tokens)
        replaced = replace_linears(model, "w8a16")
        assert set(replaced) == {"up", "down.a", "down.b"}
        assert replaced["down.a"] is replaced["down.b"]
        assert all(model.get_submodule(name) is layer for name, layer in replaced.items())
        assert type(model.head) is nn.Linear
        assert model.head.weight is model.embed.weight
        with torch.no_grad():
            after = model(tokens)
        assert 0 < float((after - before).norm() / before.norm()) < 0.02

    def test_worse_with_fewer_bits(self) -> None:
        tokens, errors = torch.arange(20), []
        for scheme in ("w8a16_g32", "w4a16_g32", "w2a16_g32"):
            model = Mlp()
            model.load_state_dict({n: normal(*t.shape) / 8 for n, t in model.state_dict().items()})
            before = model(tokens)
            replace_linears(model, scheme)
            errors.append(float((model(tokens) - before).norm().detach()))
        assert errors[0] * 4 < errors[1] < errors[2] / 2

    def test_is_round_to_nearest(self) -> None:
        model = Mlp()
        expected = quantize_groups(model.up.weight.detach(), QuantScheme(4, 32), torch.float32)
        assert_same(replace_linears(model, QuantScheme(4, 32))["up"].quantized(), expected)

    @pytest.mark.parametrize("batch_first", [True, False])
    @pytest.mark.parametrize("padded", [True, False])
    def test_a_transformer_encoder(self, batch_first: bool, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its fused path would read dense weights and never call a linear layer."""
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0, batch_first=batch_first)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first).eval()
        x = normal(3, 3, 64)
        mask = torch.tensor([[False, False, True]] * 3) if padded else None
        called: list[QuantLinear] = []
        multiply = QuantLinear._multiply

        def spy(self: QuantLinear, x: Tensor, bias: Tensor | None = None) -> Tensor:
            called.append(self)
            return multiply(self, x, bias)

        monkeypatch.setattr(QuantLinear, "_multiply", spy)
        with torch.no_grad():
            before = model(x, src_key_padding_mask=mask)
            replaced = replace_linears(model, "w8a16")
            after = model(x, src_key_padding_mask=mask)
        assert list(replaced) == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
        assert called == list(replaced.values())
        seen = torch.arange(2 if padded else 3)
        difference = (after - before).index_select(1 if batch_first else 0, seen)
        assert 0 < float(difference.norm() / before.norm()) < 0.02

    def test_attention_reads_the_weight_of_its_projection_itself(self) -> None:
        model = nn.ModuleDict({"attention": nn.MultiheadAttention(64, 4), "out": dense(64, 16)})
        assert set(replace_linears(model, "w8a16")) == {"out"}
        assert model["attention"](*[normal(3, 2, 64)] * 3)[0].shape == (3, 2, 64)

    def test_a_subclass_with_its_own_forward_stays(self) -> None:
        class Scaled(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return 2 * super().forward(x)

        class Renamed(nn.Linear):
            pass

        model = nn.Sequential(Scaled(64, 16), Renamed(64, 16))
        assert set(replace_linears(model, "w8a16")) == {"1"}

    def test_conv1d(self) -> None:
        model = nn.Sequential(Conv1D(48, 128), nn.GELU(), Conv1D(16, 48))
        x = normal(4, 128)
        before = model(x)
        assert set(replace_linears(model, "w8a16")) == {"0", "2"}
        assert float((model(x) - before).norm() / before.norm()) < 0.02

    def test_skip(self) -> None:
        assert set(replace_linears(Mlp(), "w8a16", skip=["down"])) == {"up"}
        assert set(replace_linears(Mlp(), "w8a16", skip="up")) == {"down.a", "down.b"}
        assert set(replace_linears(Mlp(), "w8a16", skip=lambda name, _: name.endswith("b"))) == {"up", "down.a"}
        with pytest.raises(InputError, match="no module 'dwon'; did you mean down"):
            replace_linears(Mlp(), "w8a16", skip=["dwon"])

    def test_a_weight_that_a_skipped_layer_shares_stays(self) -> None:
        model = nn.Sequential(dense(64, 64), dense(64, 64), dense(64, 64))
        model[1].weight = model[0].weight
        assert set(replace_linears(model, "w8a16", skip=["0"])) == {"2"}

    def test_all_shapes_are_checked_before_anything_is_touched(self) -> None:
        model = nn.Sequential(dense(128, 96), dense(96, 100), dense(100, 64))
        with pytest.raises(SchemeError) as caught:
            replace_linears(model, "w4a16_g128")
        text = str(caught.value)
        assert "2 of 3 layers cannot have w4a16_g128_sym" in text
        assert "1: in_features=96 is not a multiple of group_size=128; choose a divisor (16, 24, 32, 48, 96)" in text
        assert "2: in_features=100 " in text
        assert "\n" not in text
        assert all(type(linear) is nn.Linear for linear in model)

    def test_a_weight_that_is_not_finite(self) -> None:
        model = nn.Sequential(dense(64, 64), dense(64, 64))
        with torch.no_grad():
            model.get_parameter("1.weight")[3, 5] = float("nan")
        with pytest.raises(SchemeError, match=r"^1: "):
            replace_linears(model, "w8a16")
        assert all(type(linear) is nn.Linear for linear in model)

    def test_a_backend_that_cannot(self) -> None:
        model = nn.Sequential(dense(64, 64), dense(64, 40))
        with pytest.raises(KernelError, match=r"^1: Linear\(64, 40, .*cpu refuses out_features=40"):
            replace_linears(model, "w4a16_g64", backend="cpu")
        assert all(type(linear) is nn.Linear for linear in model)

    def test_a_model_that_is_a_linear_layer(self) -> None:
        with pytest.raises(InputError, match="use QuantLinear"):
            replace_linears(dense(64, 64), "w8a16")

    def test_stacked_experts_are_refused_unless_they_are_skipped(self) -> None:
        from families import tiny_config
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(tiny_config("mixtral"))
        experts = [f"model.layers.{i}.mlp.experts" for i in range(3)]
        with pytest.raises(InputError, match=rf"3 modules stack .* such as {experts[0]}"):
            replace_linears(model, "w8a16")
        with pytest.raises(InputError, match=rf"2 modules stack .* such as {experts[1]}"):
            replace_linears(model, "w8a16", skip=experts[:1])
        assert not any(isinstance(module, QuantLinear) for module in model.modules())
        assert "model.layers.0.self_attn.q_proj" in replace_linears(model, "w8a16", skip=experts)

    def test_twice(self) -> None:
        model = Mlp()
        replace_linears(model, "w8a16")
        assert replace_linears(model, "w8a16") == {}


def test_generates_in_transformers() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).bfloat16().eval()
    replaced = replace_linears(model, "w4a16_g64")
    assert len(replaced) == 2 * 7
    assert "lm_head" not in replaced
    assert {layer.backend for layer in replaced.values()} == {fastest_cpu()}
    out = model.generate(torch.arange(5)[None], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 9)
