"""compressed-tensors: quantization_config, written, read back, and refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import CheckpointError
from quantkit.formats import FORMATS, CompressedTensors, format_named, format_of
from quantkit.scheme import QuantScheme

FORMAT = CompressedTensors()
GOLDEN = Path(__file__).parent.parent / "golden"
CONFIG: dict[str, Any] = json.loads((GOLDEN / "compressed_tensors_config.json").read_text())["quantization_config"]


def test_the_config_of_a_uniform_model_is_the_golden_one() -> None:
    schemes = {f"model.layers.{i}.mlp.{n}_proj": QuantScheme(4, 128) for i in range(2) for n in ("up", "gate", "down")}
    assert FORMAT.write_config(schemes, ("lm_head",)) == CONFIG


def test_names_that_are_not_the_commonest_scheme() -> None:
    """Names first and the class last: a reader that takes the first match and one that ranks names agree."""
    schemes = {"a": QuantScheme(4, 32), "b": QuantScheme(8, None), "c": QuantScheme(4, 32), "d": QuantScheme(8, None)}
    schemes |= {"e": QuantScheme(4, 32), "f": QuantScheme(4, 32, symmetric=False)}
    schemes = {f"layers.0.{name}": scheme for name, scheme in schemes.items()}
    groups = FORMAT.write_config(schemes, ())["config_groups"]
    targets = [group["targets"] for group in groups.values()]
    assert sorted(targets[:-1]) == [["layers.0.b", "layers.0.d"], ["layers.0.f"]]
    assert targets[-1] == ["Linear"]
    weights = {tuple(group["targets"]): group["weights"] for group in groups.values()}
    assert weights["layers.0.b", "layers.0.d"]["strategy"] == "channel"
    assert weights["layers.0.b", "layers.0.d"]["group_size"] is None
    assert (weights["layers.0.f",]["symmetric"], weights["layers.0.f",]["zp_dtype"]) == (False, "torch.int8")


SCHEMES = st.builds(QuantScheme, st.integers(2, 8), st.sampled_from([None, 32, 64, 128]), st.booleans()) | st.builds(
    lambda symmetric, static: QuantScheme(8, None, symmetric, act_bits=8, act_static=static),
    st.booleans(),
    st.booleans(),
)
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
        ("config_groups.group_0.targets", ["re:("], "'(' is not a regular expression"),
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


@pytest.mark.parametrize("method", ["bitsandbytes", "quark", None, "", 7])
def test_other_methods_are_not_read(method: object) -> None:
    config = {"quant_method": method, "bits": 4}
    assert not FORMAT.reads(config)
    with pytest.raises(CheckpointError, match=f"quant_method {method!r} is not read.*compressed-tensors"):
        format_of(config)


def test_the_registry() -> None:
    assert [f.name for f in FORMATS] == ["compressed-tensors", "gptq", "gptq_v2", "awq"]
    assert format_named("compressed-tensors") is FORMATS[0]
    with pytest.raises(KeyError):
        format_named("gguf")
    for bits in range(2, 9):
        assert FORMAT.why_not(QuantScheme(bits, 32)) is None


# int-quantized

W8A8 = QuantScheme(8, None, act_bits=8)
STATIC = QuantScheme(8, None, act_bits=8, act_static=True)


def test_the_config_of_w8a8() -> None:
    config = FORMAT.write_config({"a": W8A8, "b": W8A8}, ("lm_head",))
    (only,) = config["config_groups"].values()
    assert (config["format"], only["format"]) == ("int-quantized", "int-quantized")
    weights, inputs = only["weights"], only["input_activations"]
    assert {k: weights[k] for k in ("num_bits", "type", "symmetric", "strategy", "group_size")} == {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "channel",
        "group_size": None,
    }
    assert {k: inputs[k] for k in ("num_bits", "type", "symmetric", "strategy", "dynamic", "observer")} == {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
        "observer": None,
    }
    (static,) = FORMAT.write_config({"a": STATIC}, ())["config_groups"].values()
    assert static["input_activations"]["strategy"] == "tensor"
    assert static["input_activations"]["dynamic"] is False


def test_weight_only_and_w8a8_layers_in_one_checkpoint() -> None:
    chosen = {"a": QuantScheme(4, 32), "b": W8A8, "c": QuantScheme(4, 32), "d": QuantScheme(8, None)}
    schemes = {f"layers.0.{name}": scheme for name, scheme in chosen.items()}
    config = FORMAT.write_config(schemes, ())
    assert config["format"] == "mixed-precision"
    formats = {tuple(group["targets"]): group["format"] for group in config["config_groups"].values()}
    assert formats == {
        ("layers.0.b",): "int-quantized",
        ("layers.0.d",): "pack-quantized",
        ("Linear",): "pack-quantized",
    }
    assert FORMAT.read_config(config, tuple(schemes)) == schemes


def w8a8(path: str, value: Any) -> dict[str, Any]:
    """A W8A8 config with one value of its group changed; ``...`` leaves it out."""
    config = FORMAT.write_config({"a": W8A8}, ())
    owner = config["config_groups"]["group_0"]
    *parents, leaf = path.split(".")
    for parent in parents:
        owner = owner[parent]
    if value is ...:
        del owner[leaf]
    else:
        owner[leaf] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "place"),
    [
        ("input_activations", None, "format 'int-quantized' of a weight-only group"),
        ("format", "pack-quantized", "format 'pack-quantized' with quantized activations"),
        ("format", "naive-quantized", "format: 'naive-quantized' is not read; quantkit reads pack-quantized"),
        ("output_activations", {"num_bits": 8}, "quantizes outputs"),
        ("weights.num_bits", 4, "w4a8_channel_sym in int-quantized"),
        ("weights.strategy", "tensor", "weights.strategy"),
        ("input_activations.num_bits", 4, "input_activations.num_bits"),
        ("input_activations.num_bits", ..., "input_activations.num_bits"),
        ("input_activations.type", "float", "input_activations.type"),
        ("input_activations.symmetric", False, "input_activations.symmetric"),
        ("input_activations.strategy", "group", "input_activations.strategy"),
        ("input_activations.strategy", "tensor", "strategy 'tensor' and dynamic True"),
        ("input_activations.dynamic", False, "strategy 'token' and dynamic False"),
        ("input_activations.dynamic", "local", "input_activations.dynamic"),
    ],
)
def test_w8a8_configs_that_quantkit_does_not_run(path: str, value: Any, place: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        FORMAT.read_config(w8a8(path, value), ("a",))
    assert place in str(caught.value)
    assert "\n" not in str(caught.value)


def test_w8a8_in_groups_is_not_run() -> None:
    config = w8a8("weights.strategy", "group")
    config["config_groups"]["group_0"]["weights"]["group_size"] = 32
    with pytest.raises(CheckpointError, match="one scale per channel"):
        FORMAT.read_config(config, ("a",))


def test_the_format_of_a_group_is_the_configs_where_it_says_nothing() -> None:
    """As files from before groups had one."""
    assert FORMAT.read_config(w8a8("format", ...), ("a",)) == {"a": W8A8}
