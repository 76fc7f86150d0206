"""Configs of GPTQ and AWQ checkpoints: quantkit's own, and those of AutoGPTQ, GPTQModel, AutoAWQ and AutoRound."""

from __future__ import annotations

from typing import Any

import pytest

from quantkit.errors import CheckpointError, SchemeError
from quantkit.formats import AWQCheckpoint, CheckpointFormat, GPTQCheckpoint, GPTQv2Checkpoint, format_of
from quantkit.scheme import QuantScheme

V1, AWQ = GPTQCheckpoint(), AWQCheckpoint()
LEAVES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NAMES = tuple(f"model.layers.{i}.{leaf}" for i in range(2) for leaf in LEAVES)
ALL = (*NAMES, "lm_head")
W4 = QuantScheme(4, 128)

OLD_AUTOGPTQ = {
    "bits": 4,
    "group_size": 128,
    "damp_percent": 0.01,
    "desc_act": False,
    "static_groups": False,
    "sym": True,
    "true_sequential": True,
    "model_name_or_path": None,
    "model_file_base_name": "gptq_model-4bit-128g",
}
OLD_AUTOAWQ = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}
GPTQMODEL = {
    "bits": 4,
    "checkpoint_format": "gptq",
    "desc_act": False,
    "format": "gptq",
    "group_size": 128,
    "lm_head": False,
    "meta": {"quantizer": ["gptqmodel:7.7.0"], "static_groups": False},
    "method": "gptq",
    "pack_dtype": "int32",
    "quant_method": "gptq",
    "sym": True,
}
AUTOROUND = {
    "autoround_version": "0.16.1",
    "bits": 4,
    "block_name_to_quantize": "model.layers",
    "data_type": "int",
    "group_size": 128,
    "packing_format": "auto_round:auto_gptq",
    "quant_method": "auto-round",
    "sym": True,
}


def read(config: dict[str, Any], names: tuple[str, ...] = ALL) -> tuple[str, dict[str, QuantScheme]]:
    fmt = format_of(config)
    return fmt.name, fmt.read_config(config, names)


@pytest.mark.parametrize(
    ("config", "name", "scheme"),
    [
        (OLD_AUTOGPTQ, "gptq", W4),
        (GPTQMODEL, "gptq", W4),
        ({**GPTQMODEL, "checkpoint_format": "gptq_v2", "sym": False}, "gptq_v2", QuantScheme(4, 128, symmetric=False)),
        ({**GPTQMODEL, "group_size": -1, "bits": 3}, "gptq", QuantScheme(3, None)),
        (OLD_AUTOAWQ, "awq", QuantScheme(4, 128, symmetric=False)),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, "awq", QuantScheme(4, 64, symmetric=False)),
        ({**OLD_AUTOAWQ, "zero_point": False}, "awq", W4),
        (AUTOROUND, "gptq", W4),
        ({**AUTOROUND, "packing_format": "auto_round", "sym": False}, "gptq_v2", QuantScheme(4, 128, symmetric=False)),
        ({**AUTOROUND, "packing_format": "auto_round:auto_awq"}, "awq", W4),
        ({**AUTOROUND, "packing_format": "auto_round:auto_awq", "sym": False}, "awq", QuantScheme(4, 128, False)),
        ({**AUTOROUND, "quant_method": "intel/auto-round", "packing_format": "auto"}, "gptq", W4),
    ],
)
def test_programs(config: dict[str, Any], name: str, scheme: QuantScheme) -> None:
    """Every layer of the blocks, and not the head."""
    assert read(config) == (name, dict.fromkeys(NAMES, scheme))


@pytest.mark.parametrize(
    ("config", "place"),
    [
        ({**OLD_AUTOAWQ, "version": "GEMV"}, "version: 'GEMV' is not read; quantkit reads gemm"),
        ({**OLD_AUTOAWQ, "version": "gemv_fast"}, "'gemv_fast'"),
        ({**GPTQMODEL, "checkpoint_format": "marlin"}, "checkpoint_format: 'marlin' is not read"),
        ({**OLD_AUTOGPTQ, "is_marlin_format": True}, "is_marlin_format"),
        ({**AUTOROUND, "packing_format": "auto_round:fp8"}, "packing_format: 'auto_round:fp8'"),
        ({**AUTOROUND, "act_bits": 8}, "8-bit activations"),
        ({**AUTOROUND, "data_type": "mx_fp"}, "data_type: 'mx_fp'"),
        ({**GPTQMODEL, "pack_dtype": "int16"}, "pack_dtype: 'int16'"),
        ({**GPTQMODEL, "bits": 9}, "bits=9"),
        ({**GPTQMODEL, "bits": "four"}, "quantization_config.bits"),
        ({**GPTQMODEL, "group_size": 0}, "group_size=0"),
        ({**GPTQMODEL, "group_size": None}, "quantization_config.group_size"),
        ({**GPTQMODEL, "dynamic": {"+:.*": {"bits": 77}}}, "bits=77"),
        ({**GPTQMODEL, "dynamic": {"+:(": {}}}, "dynamic: '(' is not a regular expression"),
        ({**GPTQMODEL, "dynamic": ["x"]}, "quantization_config.dynamic"),
        ({**OLD_AUTOAWQ, "modules_to_not_convert": [1]}, "modules_to_not_convert"),
    ],
)
def test_what_is_not_read_is_named(config: dict[str, Any], place: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(config)
    assert place in str(caught.value)
    assert "\n" not in str(caught.value)


def bits_of(config: dict[str, Any], names: tuple[str, ...] = ALL) -> dict[str, int]:
    return {name.removeprefix("model.layers."): scheme.bits for name, scheme in read(config, names)[1].items()}


def test_dynamic_rules_in_order() -> None:
    """The first rule that fits the beginning of a name decides."""
    dynamic = {
        r"-:.*\.1\.mlp": {},
        r"+:.*\.down_proj": {"bits": 8, "group_size": 32, "mse": 2.0},
        r".*\.mlp\.": {"bits": 3},
        r"+:model\.layers\.0\.self_attn\.(q|k)_proj$": {"bits": 2, "sym": False},
        r"+:self_attn": {"bits": 8},  # fits no beginning
    }
    found = read({**GPTQMODEL, "dynamic": dynamic})[1]
    assert {name: scheme.bits for name, scheme in found.items()} == {
        "model.layers.0.self_attn.q_proj": 2,
        "model.layers.0.self_attn.k_proj": 2,
        "model.layers.0.self_attn.v_proj": 4,
        "model.layers.0.mlp.gate_proj": 3,
        "model.layers.0.mlp.up_proj": 3,
        "model.layers.0.mlp.down_proj": 8,
        "model.layers.1.self_attn.q_proj": 4,
        "model.layers.1.self_attn.k_proj": 4,
        "model.layers.1.self_attn.v_proj": 4,
    }
    assert found["model.layers.0.mlp.down_proj"].group_size == 32
    assert not found["model.layers.0.self_attn.q_proj"].symmetric


def test_rules_for_fused_names() -> None:
    """As written for vLLM, which asks for qkv_proj and gate_up_proj."""
    dynamic = {r"+:.*\.0\..*qkv_proj": {"bits": 8}, r"-:.*gate_up_proj": {}}
    found = bits_of({**GPTQMODEL, "dynamic": dynamic})
    assert {name for name, bits in found.items() if bits == 8} == {f"0.self_attn.{x}_proj" for x in "qkv"}
    assert not any("gate_proj" in name or "up_proj" in name for name in found)


def test_autorounds_exceptions() -> None:
    extra = {
        "model.layers.0.mlp.up_proj": {"bits": 8},
        r".*1\.self_attn.*": {"bits": 16, "data_type": "fp"},
        "layers.0.self_attn": {"bits": 2},  # no whole name and no end of one: means nothing
        "down_proj$": {"bits": 3},  # an expression that fits anywhere
    }
    found = bits_of({**AUTOROUND, "extra_config": extra})
    assert found == {
        **{f"0.self_attn.{x}_proj": 4 for x in "qkv"},
        "0.mlp.gate_proj": 4,
        "0.mlp.up_proj": 8,
        "0.mlp.down_proj": 3,
        "1.mlp.gate_proj": 4,
        "1.mlp.up_proj": 4,
        "1.mlp.down_proj": 3,
    }


def test_heads() -> None:
    for config in ({**GPTQMODEL, "lm_head": True}, {**AUTOROUND, "extra_config": {"lm_head": {"bits": 8}}}):
        assert read(config)[1].keys() == set(ALL)
    assert read({**AUTOROUND, "extra_config": {"lm_head": {"bits": 8}}})[1]["lm_head"].bits == 8
    assert "lm_head" not in read({**AUTOROUND, "extra_config": {"lm_head": {"bits": 16}}})[1]


def test_modules_to_not_convert_are_whole_parts_of_names() -> None:
    """Mixtral's ``gate`` is not everyone's ``gate_proj``."""
    config = {**OLD_AUTOAWQ, "modules_to_not_convert": ["gate", "layers.1", "model.layers.0.mlp.down_proj"]}
    names = (*NAMES, "model.layers.0.mlp.gate")
    assert set(read(config, names)[1]) == set(NAMES[:5])


# What quantkit writes

SCHEMES = dict.fromkeys(NAMES, W4)


def test_the_config_that_is_written() -> None:
    config = V1.write_config(SCHEMES, ("lm_head",))
    assert config == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "true_sequential": False,
        "damp_percent": 0.01,
    }
    assert V1.config_files(config) == {"quantize_config.json": config}
    assert V1.write_config(SCHEMES, (), reordered=True)["desc_act"] is True
    assert GPTQv2Checkpoint().write_config(SCHEMES, ())["checkpoint_format"] == "gptq_v2"
    assert AWQ.write_config(dict.fromkeys(NAMES, QuantScheme(4, None, symmetric=False)), ("lm_head",)) == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": -1,
        "zero_point": True,
        "version": "gemm",
        "lm_head": False,
        "modules_to_not_convert": None,
    }


def test_exceptions_that_are_written() -> None:
    attention = {name: QuantScheme(8, None) for name in NAMES if "1.self_attn" in name}
    schemes = {name: scheme for name, scheme in {**SCHEMES, **attention}.items() if "0.mlp.up" not in name}
    config = V1.write_config(schemes, ("model.layers.0.mlp.up_proj", "lm_head"))
    assert config["dynamic"]["-:^model\\.layers\\.0\\.mlp\\.up_proj$"] == {}
    assert config["dynamic"]["+:^model\\.layers\\.1\\.self_attn\\.k_proj$"] == {
        "bits": 8,
        "group_size": -1,
        "sym": True,
    }
    # What vLLM asks for: all three have one scheme. Not so gate and up, of which one is left out.
    assert "+:^model\\.layers\\.1\\.self_attn\\.qkv_proj$" in config["dynamic"]
    assert not any("gate_up_proj" in rule for rule in config["dynamic"])
    assert "model.layers.1.mlp.up_proj" in config["modules_in_block_to_quantize"][0]


def test_layers_left_out_everywhere_are_told_by_their_names_in_the_block() -> None:
    kept = tuple(name for name in NAMES if "down_proj" in name)
    schemes = {name: W4 for name in NAMES if name not in kept}
    assert V1.write_config(schemes, kept)["modules_in_block_to_quantize"] == [list(LEAVES[:-1])]


@pytest.mark.parametrize("fmt", [V1, AWQ], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("kept", [(), NAMES[:2], (NAMES[5],)])
def test_what_is_written_is_read_back(fmt: CheckpointFormat, head: bool, kept: tuple[str, ...]) -> None:
    base = QuantScheme(4, 128, symmetric=False)
    schemes = {name: base for name in (ALL if head else NAMES) if name not in kept}
    if fmt is V1:
        schemes[NAMES[3]] = QuantScheme(8, None)
    config = fmt.write_config(schemes, kept if head else (*kept, "lm_head"))
    assert format_of(config) is not None
    assert fmt.read_config(config, ALL) == schemes


def test_awq_states_one_scheme() -> None:
    schemes = {NAMES[0]: QuantScheme(4, 64, symmetric=False), NAMES[1]: QuantScheme(4, 128, symmetric=False)}
    with pytest.raises(SchemeError, match="2 schemes"):
        AWQ.write_config(schemes, ())
