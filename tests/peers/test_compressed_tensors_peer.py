"""The real readers of compressed-tensors: its own package, and transformers' from_pretrained.

Run where both are installed: ``python -m pytest -m peer tests/peers``. Seen with compressed-tensors 0.20 and
transformers 5.23. What these readers cannot do with a correct file is asserted too, so that the day they can shows.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCAB, save_tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.arch import is_transposed
from quantkit.checkpoint import Checkpoint
from quantkit.formats import CompressedTensors
from quantkit.grid import activation_scale, dequantize, fake_quantize_activations, quantize_groups
from quantkit.packing import pack, unpack
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import QuantScheme
from quantkit.skeleton import open_skeleton

pytestmark = pytest.mark.peer

FORMAT = CompressedTensors()
SCHEMES = [
    QuantScheme(bits, group_size, symmetric=symmetric)
    for bits in range(2, 9)
    for group_size in (32, None)
    for symmetric in (True, False)
]


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def peer_scheme(scheme: QuantScheme) -> Any:
    """The package's own QuantizationScheme, parsed from the config that quantkit writes."""
    from compressed_tensors.quantization import QuantizationConfig

    config = FORMAT.write_config({"layer": scheme}, ("lm_head",))
    return QuantizationConfig.model_validate(json.loads(json.dumps(config))).config_groups["group_0"]


# The package's packers on single tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_package_decodes_what_quantkit_encodes(scheme: QuantScheme, dtype: torch.dtype) -> None:
    """To the same bits, 37 rows that fill no word of zero points included."""
    from compressed_tensors.compressors import BaseCompressor

    q = quantize_groups(randn(0, 37, 96) + 0.3, scheme, dtype)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    found = compressor.decompress(FORMAT.encode(q), peer_scheme(scheme))["weight"]
    assert found.dtype == dtype
    assert torch.equal(found, dequantize(q))
    assert torch.equal(found, dequantize(FORMAT.decode("layer", FORMAT.encode(q), scheme, (37, 96))))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_quantkit_decodes_what_the_package_encodes(scheme: QuantScheme) -> None:
    from compressed_tensors.compressors import BaseCompressor

    weight = randn(1, 37, 96).bfloat16()
    q = quantize_groups(weight.float(), scheme, torch.bfloat16)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    state = {
        "weight": weight,
        "weight_scale": q.scale,
        "weight_zero_point": (q.zero_point.int() - scheme.mid).to(torch.int8),
    }
    tensors = compressor.compress(state, peer_scheme(scheme))
    back = FORMAT.decode("layer", tensors, scheme, (37, 96))
    decoded = compressor.decompress(tensors, peer_scheme(scheme))["weight"]
    assert torch.equal(dequantize(back), decoded)
    assert set(tensors) == set(FORMAT.encode(back))
    for name, tensor in FORMAT.encode(back).items():
        assert torch.equal(tensor, tensors[name].to(tensor.dtype)), name


W8A8 = [
    QuantScheme(8, None, symmetric, act_bits=8, act_static=static)
    for symmetric in (True, False)
    for static in (True, False)
]


def w8a8(scheme: QuantScheme, weight: Tensor, dtype: torch.dtype) -> QuantizedTensor:
    """Rounded to nearest, with a static scale for inputs up to about 3."""
    q = quantize_groups(weight.float(), scheme.weight_only, dtype)
    act_scale = activation_scale(3.0, dtype) if scheme.act_static else None
    return replace(q, scheme=scheme, act_scale=act_scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", W8A8, ids=str)
def test_the_package_decodes_int_quantized(scheme: QuantScheme, dtype: torch.dtype) -> None:
    from compressed_tensors.compressors import BaseCompressor

    q = w8a8(scheme, randn(0, 37, 96) + 0.3, dtype)
    compressor = BaseCompressor.get_value_from_registry("int-quantized")
    found = compressor.decompress(FORMAT.encode(q), peer_scheme(scheme))["weight"]
    assert found.dtype == dtype
    assert torch.equal(found, dequantize(FORMAT.decode("layer", FORMAT.encode(q), scheme, (37, 96))))
    assert torch.equal(found, dequantize(q))


@pytest.mark.parametrize("scheme", W8A8, ids=str)
def test_quantkit_decodes_int_quantized_of_the_package(scheme: QuantScheme) -> None:
    """The package drops the zero points of what is symmetric, and names what quantkit names."""
    from compressed_tensors.compressors import BaseCompressor

    weight = randn(1, 37, 96).bfloat16()
    q = w8a8(scheme, weight, torch.bfloat16)
    state = {
        "weight": weight,
        "weight_scale": q.scale,
        "weight_zero_point": (q.zero_point.int() - scheme.mid).to(torch.int8),
    }
    if q.act_scale is not None:
        state["input_scale"] = torch.tensor([q.act_scale], dtype=torch.bfloat16)
        state["input_zero_point"] = torch.zeros(1, dtype=torch.int8)
    compressor = BaseCompressor.get_value_from_registry("int-quantized")
    tensors = compressor.compress(state, peer_scheme(scheme))
    back = FORMAT.decode("layer", tensors, scheme, (37, 96))
    assert torch.equal(dequantize(back), compressor.decompress(tensors, peer_scheme(scheme))["weight"])
    assert back.act_scale == q.act_scale
    assert set(tensors) == set(FORMAT.encode(back))
    for name, tensor in FORMAT.encode(back).items():
        assert torch.equal(tensor, tensors[name]), name


@pytest.mark.parametrize("scheme", W8A8[:2], ids=str)
def test_the_package_rounds_activations_the_same(scheme: QuantScheme) -> None:
    """In float32 to the same bits, however large the tokens are; the package's own formula is run for each token."""
    from compressed_tensors.quantization import QuantizationStatus
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    x = randn(2, 3, 17, 96) * 10.0 ** torch.arange(-8, 9)[None, :, None]
    module = nn.Linear(96, 5)
    module.quantization_status = QuantizationStatus.FROZEN
    act_scale = activation_scale(3.0, torch.float32) if scheme.act_static else None
    if act_scale is not None:
        module.input_scale = nn.Parameter(torch.tensor([act_scale]), requires_grad=False)
    theirs = forward_quantize(module, x, "input", peer_scheme(scheme).input_activations)
    assert torch.equal(fake_quantize_activations(x, act_scale), theirs)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 96, 101])
@pytest.mark.parametrize("bits", range(1, 9))
def test_the_packers_agree_bit_by_bit(bits: int, length: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (5, length), generator=generator, dtype=torch.uint8)
    signed = (codes.int() - (1 << (bits - 1))).to(torch.int8)
    words = pack_to_int32(signed, bits)
    assert torch.equal(pack(codes, bits), words)
    assert torch.equal(unpack(words, bits, length), codes)
    assert torch.equal(unpack_from_int32(pack(codes, bits), bits, torch.Size([5, length])), signed)


# Which scheme a module has


NAMES = [f"layers.{i}.{n}" for i in range(3) for n in ("q_proj", "up_proj")] + ["lm_head"]


def group(targets: list[str], bits: int) -> dict[str, Any]:
    return {"targets": targets, "weights": {"num_bits": bits, "strategy": "channel", "symmetric": True}}


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(8, 8), "up_proj": nn.Linear(8, 8)}) for _ in range(3)
        )
        self.lm_head = nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("groups", "ignore"),
    [
        ([group(["Linear"], 4)], ["lm_head"]),
        ([group(["Linear"], 4), group(["layers.1.q_proj", "lm_head"], 8)], []),
        ([group(["layers.1.q_proj"], 8), group(["Linear"], 4)], ["lm_head", "layers.2.up_proj"]),
        ([group(["re:.*q_proj"], 3), group(["Linear"], 4)], ["re:.*head"]),
        ([group(["Linear"], 4), group(["re:.*q_proj"], 3)], ["re:layers.1"]),
        ([group(["re:layers.1"], 3)], []),
        ([group(["layers.0"], 3), group(["re:.*up_proj$"], 5)], []),
        ([group(["re:.*q_proj"], 3), group(["layers.0.q_proj"], 8)], []),
    ],
)
def test_targets_mean_the_same_modules(groups: list[dict[str, Any]], ignore: list[str]) -> None:
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{index}": value for index, value in enumerate(groups)},
        "ignore": ignore,
    }
    toy = Toy()
    apply_quantization_config(toy, QuantizationConfig.model_validate(copy.deepcopy(config)))
    schemes = {name: getattr(toy.get_submodule(name), "quantization_scheme", None) for name in NAMES}
    expected = {name: scheme.weights.num_bits for name, scheme in schemes.items() if scheme is not None}
    assert {n: s.bits for n, s in FORMAT.read_config(config, tuple(NAMES)).items()} == expected


# Whole checkpoints


Made = Callable[[str, str], tuple[Path, Path]]
RECIPES: dict[str, dict[str, Any]] = {
    "gptq-w4": {"scheme": "w4a16_g32", "method": "gptq"},
    "gptq-w3-channel": {"scheme": "w3a16_channel", "method": "gptq"},
    "gptq-w4-asym": {"scheme": "w4a16_g32_asym", "method": "gptq"},
    "rtn-w2-asym-channel": {"scheme": "w2a16_channel_asym", "method": "rtn"},
    "rtn-w8": {"scheme": "w8a16", "method": "rtn"},
    "mixed": {
        "scheme": "w4a16_g32",
        "method": "gptq",
        "rules": [
            {"match": "*.down_proj", "scheme": "w8a16"},
            {"match": "model.layers.0.*v_proj", "skip": True},
            {"match": "*.1.self_attn.?_proj", "scheme": "w5a16_g16", "method": "rtn"},
        ],
    },
    "mixed-same-groups": {
        "scheme": "w8a16_g32",
        "method": "rtn",
        "rules": [{"match": "*.gate_proj", "scheme": "w4a16_g32"}],
    },
    "mixed-asym": {
        "scheme": "w4a16_g32_asym",
        "method": "rtn",
        "rules": [{"match": "*.down_proj", "scheme": "w8a16_g32"}],
    },
    "w8a8": {"scheme": "w8a8", "method": "gptq"},
    "w8a8-static": {"scheme": "w8a8_static", "method": "gptq"},
    "w8a8-asym": {"scheme": "w8a8_asym", "method": "rtn"},
    "w8a8-beside-w4": {
        "scheme": "w8a8",
        "method": "rtn",
        "rules": [{"match": "*.gate_proj", "scheme": "w4a16_g32"}, {"match": "*.up_proj", "scheme": "w8a8_static"}],
    },
}
INT8 = ["w8a8", "w8a8-static", "w8a8-beside-w4"]
SYMMETRIC = ["gptq-w4", "gptq-w3-channel", "rtn-w8", "mixed"]
ASYMMETRIC = ["gptq-w4-asym", "rtn-w2-asym-channel"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Makes each checkpoint once: (source, quantized)."""
    root = tmp_path_factory.mktemp("peer")

    def make(family: str, recipe: str) -> tuple[Path, Path]:
        source, output = root / family, root / f"{family}-{recipe}"
        if not source.is_dir():
            save_tiny(family, source, torch.bfloat16 if family == "mistral" else torch.float32)
        if not output.is_dir():
            tokens = torch.randint(0, VOCAB, (6, 24), generator=torch.Generator().manual_seed(0)).unbind()
            quantkit.quantize(source, output, recipe=RECIPES[recipe], tokens=tokens, device="cpu")
        return source, output

    return make


def decoded(output: Path) -> dict[str, QuantizedTensor]:
    """Every quantized layer of a checkpoint, as quantkit reads it."""
    checkpoint = Checkpoint(output)
    skeleton = open_skeleton(checkpoint, torch.float32)
    schemes = FORMAT.read_config(checkpoint.config["quantization_config"], tuple(i.name for i in skeleton.linears))
    layers = {}
    for info in skeleton.linears:
        if info.name in schemes:
            names = [name for name in checkpoint.tensors if name.rpartition(".")[0] == info.stem]
            tensors = {name.rpartition(".")[2]: tensor for name, tensor in checkpoint.read(names).items()}
            shape = (info.out_features, info.in_features)
            layers[info.name] = FORMAT.decode(info.name, tensors, schemes[info.name], shape)
    return layers


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    tokens = torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))
    found: Tensor = model.eval()(tokens).logits.float()
    return found


def expected_logits(source: Path, output: Path) -> Tensor:
    """Of the source model with quantkit's dequantized weights in place of its own."""
    model = AutoModelForCausalLM.from_pretrained(source)
    own = logits(model)
    for name, q in decoded(output).items():
        module = model.get_submodule(name)
        weight = dequantize(q, model.dtype)
        module.weight = nn.Parameter(weight.T.contiguous() if is_transposed(module) else weight)
    found = logits(model)
    assert float((found - own).abs().max()) > 1e-3  # so that reading the wrong weights would show
    return found


def opened(output: Path, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The model as transformers opens it, and what it says of missing and unexpected tensors."""
    pair: Any = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True, **options)
    return pair[0], pair[1]


def peer_logits(output: Path, **options: Any) -> Tensor:
    model, info = opened(output, **options)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return logits(model)


def dequantizing() -> dict[str, Any]:
    from transformers import CompressedTensorsConfig

    return {"quantization_config": CompressedTensorsConfig(dequantize=True)}


@pytest.mark.parametrize("recipe", SYMMETRIC)
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_transformers_gives_the_same_logits(family: str, recipe: str, made: Made) -> None:
    """Untied, tied (qwen2) and bfloat16 (mistral); "mixed" has three config groups, the class target last."""
    source, output = made(family, recipe)
    torch.testing.assert_close(peer_logits(output), expected_logits(source, output), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recipe", ASYMMETRIC)
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_transformers_loads_asymmetric_weights_dequantized(family: str, recipe: str, made: Made) -> None:
    """Its default path makes zero points that are not packed and refuses the packed ones; dequantize=True is right."""
    source, output = made(family, recipe)
    expected = expected_logits(source, output)
    torch.testing.assert_close(peer_logits(output, **dequantizing()), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError):
        peer_logits(output)


@pytest.mark.parametrize("recipe", ["gptq-w4", "rtn-w8"])
def test_transformers_dequantizes_symmetric_weights(recipe: str, made: Made) -> None:
    source, output = made("llama", recipe)
    expected = expected_logits(source, output)
    torch.testing.assert_close(peer_logits(output, **dequantizing()), expected, rtol=1e-5, atol=1e-6)


def test_mixed_schemes_name_the_same_modules(made: Made) -> None:
    """The package, on the model and config.json as transformers reads them: names first, the class last."""
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    source, output = made("llama", "mixed")
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    groups = list(config["config_groups"].values())
    assert len(groups) == 3
    assert groups[-1]["targets"] == ["Linear"]
    model = AutoModelForCausalLM.from_pretrained(source)
    apply_quantization_config(model, QuantizationConfig.model_validate(config))
    theirs = {
        name: (scheme.weights.num_bits, scheme.weights.group_size)
        for name, module in model.named_modules()
        if (scheme := getattr(module, "quantization_scheme", None)) is not None
    }
    assert theirs == {name: (q.scheme.bits, q.scheme.group_size) for name, q in decoded(output).items()}
    assert len(theirs) == 20


def test_transformers_dequantizes_mixed_schemes_wrong(made: Made) -> None:
    """Its dequantize=True takes the first config group for all layers: 8-bit layers read as 4-bit, with no error.

    The default path is right. A checkpoint that is both mixed and asymmetric has no path there at all.
    """
    source, output = made("llama", "mixed-same-groups")
    expected = expected_logits(source, output)
    torch.testing.assert_close(peer_logits(output), expected, rtol=1e-5, atol=1e-6)
    assert float((peer_logits(output, **dequantizing()) - expected).abs().max()) > 1e-2
    _, output = made("llama", "mixed-asym")
    with pytest.raises(RuntimeError):
        peer_logits(output)
    with pytest.raises(RuntimeError):
        peer_logits(output, **dequantizing())


@pytest.mark.parametrize("recipe", ["gptq-w4-asym", "mixed-asym"])
def test_quantkit_in_its_place_refuses_its_config_and_dequantizes_when_asked(recipe: str, made: Made) -> None:
    source, output = made("llama", recipe)
    quantkit.transformers.register()
    try:
        with pytest.raises(ValueError, match="QuantkitConfig but you are passing a CompressedTensorsConfig"):
            opened(output, **dequantizing())
        model: Any = opened(output)[0]
        model.dequantize()
    finally:
        quantkit.transformers.unregister()
    assert not any(isinstance(module, quantkit.QuantLinear) for module in model.modules())
    torch.testing.assert_close(logits(model), expected_logits(source, output), rtol=1e-4, atol=1e-5)


def test_transformers_does_not_read_quantized_conv1d(made: Made) -> None:
    """compressed-tensors knows Linear and Embedding: GPT-2's Conv1D layers get random weights, and a warning."""
    _, output = made("gpt2", "gptq-w4")
    assert len(decoded(output)) == 12
    _, info = opened(output)
    assert len(info["missing_keys"]) == 12
    assert any(key.endswith("c_attn.weight_packed") for key in info["unexpected_keys"])


@pytest.mark.parametrize("recipe", ["gptq-w4", "mixed", "gptq-w4-asym"])
def test_quantkits_own_loader_agrees(recipe: str, made: Made) -> None:
    source, output = made("llama", recipe)
    model = quantkit.load(output, device="cpu", backend="reference")
    torch.testing.assert_close(logits(model), expected_logits(source, output), rtol=1e-4, atol=1e-5)


# int-quantized checkpoints: the client rounds activations too, in its own dtype


def mean_difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Of the log-probabilities: the mean absolute difference, and that of the negative log-likelihoods."""
    first, second = a.log_softmax(-1), b.log_softmax(-1)
    tokens = torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))
    picked = tokens[:, 1:, None]
    nll = (first - second)[:, :-1].gather(-1, picked).mean()
    return float((first - second).abs().mean()), abs(float(nll))


@pytest.mark.parametrize("recipe", INT8)
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_transformers_runs_int_quantized(family: str, recipe: str, made: Made) -> None:
    """Against quantkit's integer products: within 0.03 of NLL and 0.25 of mean |dlogp|, in float32 far below."""
    source, output = made(family, recipe)
    model = quantkit.load(output, device="cpu")
    backends = {m.backend for m in model.modules() if isinstance(m, quantkit.QuantLinear)}
    assert "cpu_int8" in backends
    ours, theirs = logits(model), peer_logits(output)
    difference, nll = mean_difference(ours, theirs)
    exact = family != "mistral"  # which is bfloat16
    assert difference < (2e-3 if exact else 0.25)
    assert nll < (2e-3 if exact else 0.03)
    own = logits(AutoModelForCausalLM.from_pretrained(source))
    assert float((theirs - own).abs().max()) > 1e-3


def test_transformers_runs_asymmetric_int_quantized(made: Made) -> None:
    """Its zero points are not packed, so what fails for pack-quantized works here."""
    _, output = made("llama", "w8a8-asym")
    difference, _ = mean_difference(logits(quantkit.load(output, device="cpu")), peer_logits(output))
    assert difference < 2e-3
