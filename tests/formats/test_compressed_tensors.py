"""compressed-tensors: golden words, exact round trips, and what malformed files and configs are told."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.errors import CheckpointError, SchemeError
from quantkit.formats import FORMATS, CompressedTensors, format_named, format_of
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import QuantScheme

FORMAT = CompressedTensors()
GOLDEN = Path(__file__).parent.parent / "golden"
WORDS = json.loads((GOLDEN / "words.json").read_text())
CONFIG: dict[str, Any] = json.loads((GOLDEN / "compressed_tensors_config.json").read_text())["quantization_config"]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def make(
    scheme: QuantScheme, rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> QuantizedTensor:
    """Random codes, zero points and scales, half of which are negative (AutoRound writes such files)."""
    generator = torch.Generator().manual_seed(seed)
    groups = scheme.num_groups(columns)
    codes = torch.randint(0, scheme.levels, (rows, columns), generator=generator, dtype=torch.uint8)
    zero_point = torch.randint(0, scheme.levels, (rows, groups), generator=generator, dtype=torch.uint8)
    scale = torch.rand(rows, groups, generator=generator) + 0.5
    scale[::2] *= -1
    zero_point = zero_point.fill_(scheme.mid) if scheme.symmetric else zero_point
    return QuantizedTensor(codes, scale.to(dtype), zero_point, scheme)


def hexadecimal(words: Tensor) -> list[str]:
    return [f"{int(word) & 0xFFFFFFFF:08x}" for word in words]


def golden(bits: int) -> QuantizedTensor:
    k, n = torch.arange(64), torch.arange(32)
    g = torch.arange(2)
    codes = (3 * k[None, :] + 5 * n[:, None]) % 2**bits
    zeros = (7 * g[None, :] + n[:, None]) % 2**bits
    scheme = QuantScheme(bits, 32, symmetric=False)
    return QuantizedTensor(codes.to(torch.uint8), torch.ones(32, 2), zeros.to(torch.uint8), scheme)


def test_golden_words_of_codes_and_zero_points() -> None:
    tensors = FORMAT.encode(golden(4))
    words = WORDS["compressed_tensors"]["4"]
    assert hexadecimal(tensors["weight_packed"][0, :4]) == words["weight_packed[0, :4]"]
    assert hexadecimal(tensors["weight_zero_point"][:, 0]) == words["weight_zero_point[:, 0]"]
    # The identities of FORMATS.md: the transposes are GPTQ's words.
    assert hexadecimal(tensors["weight_packed"].T[0, :4]) == WORDS["gptq"]["4"]["qweight[0, :4]"]
    assert hexadecimal(tensors["weight_zero_point"].T[0]) == WORDS["gptq"]["4"]["v2 qzeros[0]"]


@pytest.mark.parametrize("bits", [3, 8])
def test_golden_words_of_other_widths(bits: int) -> None:
    packed = FORMAT.encode(golden(bits))["weight_packed"]
    assert hexadecimal(packed[0, :3]) == WORDS["compressed_tensors"][str(bits)]["weight_packed[0, :3]"]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_names_shapes_and_dtypes(bits: int, symmetric: bool) -> None:
    scheme = QuantScheme(bits, 30, symmetric=symmetric)
    q = make(scheme, rows=7, columns=90)
    tensors = FORMAT.encode(q)
    found = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}
    expected = {
        "weight_packed": (torch.int32, [7, -(-90 * bits // 32)]),
        "weight_scale": (torch.bfloat16, [7, 3]),
        "weight_shape": (torch.int64, [2]),
    }
    if not symmetric:
        expected["weight_zero_point"] = (torch.int32, [-(-7 * bits // 32), 3])
    assert found == expected
    assert tensors["weight_shape"].tolist() == [7, 90]
    assert torch.equal(tensors["weight_scale"], q.scale)
    assert all(tensor.is_contiguous() for tensor in tensors.values())  # safetensors asks for it


@settings(deadline=None)
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    rows=st.integers(1, 70),
    group=st.integers(1, 40),
    groups=st.integers(1, 4),
    channel=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_decode_inverts_encode(
    bits: int, symmetric: bool, rows: int, group: int, groups: int, channel: bool, dtype: torch.dtype, seed: int
) -> None:
    """Rows that do not fill a word of zero points included."""
    scheme = QuantScheme(bits, None if channel else group, symmetric=symmetric)
    q = make(scheme, rows, group * groups, dtype, seed)
    back = FORMAT.decode("layer", FORMAT.encode(q), scheme, (rows, group * groups))
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.scale, q.scale)
    assert torch.equal(back.zero_point, q.zero_point)
    assert (back.scheme, back.scale.dtype, back.g_idx) == (scheme, dtype, None)
    assert back.digest() == q.digest()


@pytest.mark.parametrize("scheme", [QuantScheme(4, 64), QuantScheme(3, 32, symmetric=False), QuantScheme(8, None)])
def test_the_size_is_what_the_scheme_promises(scheme: QuantScheme) -> None:
    tensors = FORMAT.encode(make(scheme, rows=64, columns=128))
    stored = sum(t.numel() * t.element_size() for name, t in tensors.items() if name != "weight_shape")
    assert 8 * stored == scheme.bits_per_weight(128) * 64 * 128


def test_reordered_groups_are_not_written() -> None:
    q = make(QuantScheme(4, 16), 4, 32)
    reordered = QuantizedTensor(q.codes, q.scale, q.zero_point, q.scheme, (torch.arange(32) % 2).to(torch.int32))
    with pytest.raises(SchemeError, match="g_idx"):
        FORMAT.encode(reordered)


ASYM, SYM = QuantScheme(4, 16, symmetric=False), QuantScheme(4, 16)


def refused(tensors: dict[str, Tensor], scheme: QuantScheme = ASYM, shape: tuple[int, int] = (6, 48)) -> str:
    """The one line that a stranger's tensors are refused with."""
    with pytest.raises(CheckpointError) as caught:
        FORMAT.decode("model.layers.0.mlp.up_proj", tensors, scheme, shape)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def encoded(scheme: QuantScheme = ASYM) -> dict[str, Tensor]:
    return FORMAT.encode(make(scheme, 6, 48))


@pytest.mark.parametrize("name", ["weight_packed", "weight_scale", "weight_zero_point"])
def test_missing_tensors(name: str) -> None:
    tensors = encoded()
    del tensors[name]
    assert refused(tensors).startswith(f"model.layers.0.mlp.up_proj.{name}: is missing; ")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("weight_packed", torch.int64),
        ("weight_packed", torch.uint8),
        ("weight_packed", torch.float32),
        ("weight_scale", torch.float64),
        ("weight_scale", torch.int32),
        ("weight_zero_point", torch.int8),
        ("weight_zero_point", torch.bfloat16),
    ],
)
def test_wrong_dtypes(name: str, dtype: torch.dtype) -> None:
    tensors = encoded()
    tensors[name] = tensors[name].to(dtype)
    found = refused(tensors)
    assert found.startswith(f"model.layers.0.mlp.up_proj.{name}: is {str(dtype).removeprefix('torch.')} ")
    assert "asks for" in found


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("weight_packed", (5, 6)),
        ("weight_packed", (6, 7)),
        ("weight_packed", (6, 6, 1)),
        ("weight_packed", (36,)),
        ("weight_scale", (6, 1)),
        ("weight_scale", (3, 6)),
        ("weight_scale", (6, 3, 1)),
        ("weight_scale", ()),
        ("weight_zero_point", (6, 3)),
        ("weight_zero_point", (3, 1)),
        ("weight_zero_point", (0, 3)),
    ],
)
def test_wrong_shapes(name: str, shape: tuple[int, ...]) -> None:
    tensors = encoded()
    tensors[name] = torch.ones(shape, dtype=tensors[name].dtype)
    found = refused(tensors)
    assert found.startswith(f"model.layers.0.mlp.up_proj.{name}: is ")
    assert str(list(shape)) in found


@pytest.mark.parametrize("scheme", [ASYM, SYM])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 0.0, -0.0])
def test_scales_that_make_no_sense(bad: float, scheme: QuantScheme) -> None:
    tensors = encoded(scheme)
    tensors["weight_scale"][4, 2] = bad
    assert refused(tensors, scheme).startswith("model.layers.0.mlp.up_proj.weight_scale: holds NaN, inf or 0; ")


@pytest.mark.parametrize("stored", [[48, 6], [6, 47], [6], [], [6, 48, 1], [-6, -48]])
def test_a_weight_shape_that_lies(stored: list[int]) -> None:
    tensors = encoded() | {"weight_shape": torch.tensor(stored, dtype=torch.int64)}
    assert refused(tensors).startswith("model.layers.0.mlp.up_proj.weight_shape: ")


@pytest.mark.parametrize("shape", [(6, 64), (6, 32), (5, 48), (48, 6), (7, 48)])
def test_the_models_shape_decides(shape: tuple[int, int]) -> None:
    scheme = QuantScheme(4, None)
    assert "model.layers.0.mlp.up_proj.weight_" in refused(encoded(scheme), scheme, shape)


def test_the_configs_scheme_decides() -> None:
    for scheme in (QuantScheme(8, 16), QuantScheme(3, 16), QuantScheme(4, 24), QuantScheme(4, None)):
        assert "model.layers.0.mlp.up_proj.weight_" in refused(encoded(SYM), scheme)
    assert "weight_zero_point: is missing" in refused(encoded(SYM), ASYM)


def test_a_group_size_that_does_not_divide() -> None:
    assert "model.layers.0.mlp.up_proj" in refused(encoded(), QuantScheme(4, 32))


def test_reordered_groups_are_refused() -> None:
    g_idx = (torch.arange(48) % 3).to(torch.int32)
    assert "g_idx" in refused(encoded() | {"weight_g_idx": g_idx})


# quantization_config


def test_the_config_of_a_uniform_model_is_the_golden_one() -> None:
    schemes = {f"model.layers.{i}.mlp.{n}_proj": QuantScheme(4, 128) for i in range(2) for n in ("up", "gate", "down")}
    assert FORMAT.write_config(schemes, ("lm_head",)) == CONFIG


def test_names_that_are_not_the_commonest_scheme() -> None:
    """Names first and the class last: a reader that takes the first match and one that ranks names agree."""
    schemes = {"a": QuantScheme(4, 32), "b": QuantScheme(8, None), "c": QuantScheme(4, 32), "d": QuantScheme(8, None)}
    schemes |= {"e": QuantScheme(4, 32), "f": QuantScheme(4, 32, symmetric=False)}
    groups = FORMAT.write_config(schemes, ())["config_groups"]
    targets = [group["targets"] for group in groups.values()]
    assert sorted(targets[:-1]) == [["b", "d"], ["f"]]
    assert targets[-1] == ["Linear"]
    weights = {tuple(group["targets"]): group["weights"] for group in groups.values()}
    assert weights["b", "d"]["strategy"] == "channel"
    assert weights["b", "d"]["group_size"] is None
    assert (weights["f",]["symmetric"], weights["f",]["zp_dtype"]) == (False, "torch.int8")


SCHEMES = st.builds(QuantScheme, st.integers(2, 8), st.sampled_from([None, 32, 64, 128]), st.booleans())
NAMES = st.sampled_from([f"model.layers.{i}.{n}" for i in range(12) for n in ("q_proj", "up_proj")] + ["lm_head"])


@settings(deadline=None)
@given(st.dictionaries(NAMES, st.none() | SCHEMES, min_size=1))
def test_read_config_inverts_write_config(chosen: dict[str, QuantScheme | None]) -> None:
    schemes = {name: scheme for name, scheme in chosen.items() if scheme is not None}
    skipped = tuple(name for name, scheme in chosen.items() if scheme is None)
    config = json.loads(json.dumps(FORMAT.write_config(schemes, skipped)))
    assert FORMAT.reads(config)
    assert format_of(config) is FORMATS[0]
    assert FORMAT.read_config(config, tuple(chosen)) == schemes


def changed(path: str, value: Any) -> dict[str, Any]:
    """The golden config with one value changed; ``w.`` stands for the weight arguments of its group."""
    config = copy.deepcopy(CONFIG)
    *parents, leaf = path.replace("w.", "config_groups.group_0.weights.").split(".")
    owner = config
    for parent in parents:
        owner = owner[parent]
    if value is ...:
        del owner[leaf]
    else:
        owner[leaf] = value
    return config


def group(targets: list[str], bits: int = 4) -> dict[str, Any]:
    return {"targets": targets, "weights": {"num_bits": bits, "strategy": "channel"}}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("config_groups", ...),
        ("config_groups", None),
        ("config_groups", []),
        ("config_groups", {"W4A16": ["Linear"]}),
        ("config_groups.group_0", None),
        ("config_groups.group_0.targets", ...),
        ("config_groups.group_0.targets", "Linear"),
        ("config_groups.group_0.targets", [1]),
        ("config_groups.group_0.targets", ["re:("]),
        ("config_groups.group_0.weights", None),
        ("config_groups.group_0.weights", "w4a16"),
        ("config_groups.group_0.input_activations", {"num_bits": 8, "strategy": "token", "dynamic": True}),
        ("config_groups.group_0.output_activations", {"num_bits": 8}),
        ("config_groups.group_0.format", "int-quantized"),
        ("config_groups.group_0.format", "nvfp4-pack-quantized"),
        ("format", 3),
        ("ignore", "lm_head"),
        ("ignore", [None]),
        ("ignore", ["re:*"]),
        ("w.num_bits", ...),
        ("w.num_bits", 9),
        ("w.num_bits", 1),
        ("w.num_bits", 0),
        ("w.num_bits", 4.5),
        ("w.num_bits", "four"),
        ("w.num_bits", True),
        ("w.type", "float"),
        ("w.strategy", ...),
        ("w.strategy", "tensor"),
        ("w.strategy", "block"),
        ("w.strategy", "tensor_group"),
        ("w.group_size", 0),
        ("w.group_size", -1),
        ("w.group_size", None),
        ("w.group_size", "many"),
        ("w.actorder", "group"),
    ],
)
def test_configs_that_quantkit_does_not_run(path: str, value: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        FORMAT.read_config(changed(path, value), ("model.layers.0.mlp.up_proj",))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("config.json: quantization_config")


def test_a_config_error_names_the_place() -> None:
    for path, value, place in (
        ("w.num_bits", 9, "config_groups.group_0: scheme: bits=9"),
        ("w.strategy", "block", "config_groups.group_0.weights.strategy: "),
        ("config_groups.group_0.targets", ["re:("], "'re:(' is not a regular expression"),
        ("ignore", [None], "quantization_config.ignore.0: "),
    ):
        with pytest.raises(CheckpointError) as caught:
            FORMAT.read_config(changed(path, value), ("a",))
        assert place in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("w.actorder", True),
        ("w.actorder", "dynamic"),
        ("w.actorder", "GROUP"),
        ("w.actorder", "activation"),
        ("transform_config", {"config_groups": {"R3": {"type": "hadamard", "apply": []}}}),
        ("sparsity_config", {"format": "sparse-24-bitmask"}),
    ],
)
def test_configs_that_mean_other_weights(path: str, value: Any) -> None:
    """compressed-tensors takes actorder true and "dynamic" for "group", and names without regard to case."""
    with pytest.raises(CheckpointError):
        FORMAT.read_config(changed(path, value), ("a",))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("w.actorder", "weight"),
        ("w.actorder", "static"),
        ("w.actorder", False),
        ("w.actorder", ...),
        ("w.observer", "mse"),
        ("w.zp_dtype", "torch.int8"),
        ("w.type", ...),
        ("w.symmetric", ...),
        ("version", "0.99.0"),
        ("config_groups.group_0.format", None),
        ("config_groups.group_0.format", ...),
        ("quantkit", {"version": "0.1.0"}),
        ("ignore", ...),
        ("global_compression_ratio", 3.7),
    ],
)
def test_what_does_not_change_the_weight_is_let_through(path: str, value: Any) -> None:
    assert FORMAT.read_config(changed(path, value), ("a",)) == {"a": QuantScheme(4, 128)}


def test_mixed_formats() -> None:
    config = changed("format", "mixed-precision")
    assert FORMAT.read_config(config, ("a",)) == {"a": QuantScheme(4, 128)}
    del config["config_groups"]["group_0"]["format"]
    with pytest.raises(CheckpointError, match="mixed-precision"):
        FORMAT.read_config(config, ("a",))


def test_targets_and_ignore() -> None:
    names = (*(f"model.layers.{i}.{n}" for i in range(3) for n in ("q_proj", "up_proj")), "lm_head")
    config = {**CONFIG, "ignore": ["re:.*layers\\.1\\.", "lm_head"]}
    config["config_groups"] = {
        "group_0": group(["Linear"], 2),
        "group_1": group(["re:.*up_proj$"], 3),
        "group_2": group(["model.layers.0.q_proj"], 8),
    }
    found = FORMAT.read_config(config, names)
    assert {name: scheme.bits for name, scheme in found.items()} == {
        "model.layers.0.q_proj": 8,  # names before classes, wherever they stand
        "model.layers.0.up_proj": 3,
        "model.layers.2.q_proj": 2,
        "model.layers.2.up_proj": 3,
    }


def test_a_pattern_matches_from_the_start_as_upstream() -> None:
    """compressed-tensors uses re.match: the start is bound, the end is not."""
    config = {**CONFIG, "config_groups": {"g": group(["re:model.layers.1"])}, "ignore": []}
    names = ("model.layers.1.up_proj", "model.layers.11.up_proj", "draft.model.layers.1.up_proj")
    assert set(FORMAT.read_config(config, names)) == set(names[:2])


def test_a_name_is_no_pattern_and_no_prefix() -> None:
    config = {**CONFIG, "config_groups": {"g": group(["model.layers.1"])}, "ignore": []}
    assert FORMAT.read_config(config, ("model.layers.1.up_proj", "modelxlayers.1", "model.layers.1")) == {
        "model.layers.1": QuantScheme(4, None)
    }


def test_exact_names_come_before_patterns() -> None:
    groups = {"group_0": group(["re:.*q_proj"], 4), "group_1": group(["model.layers.0.q_proj"], 8)}
    found = FORMAT.read_config({**CONFIG, "config_groups": groups}, ("model.layers.0.q_proj",))
    assert found["model.layers.0.q_proj"].bits == 8


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", None, "", 7])
def test_other_methods_are_not_read(method: object) -> None:
    config = {"quant_method": method, "bits": 4}
    assert not FORMAT.reads(config)
    with pytest.raises(CheckpointError, match=f"quant_method {method!r} is not read.*compressed-tensors"):
        format_of(config)


def test_the_registry() -> None:
    assert [f.name for f in FORMATS] == ["compressed-tensors"]
    assert format_named("compressed-tensors") is FORMATS[0]
    with pytest.raises(KeyError):
        format_named("awq")
    for bits in range(2, 9):
        assert FORMAT.why_not(QuantScheme(bits, 32)) is None
