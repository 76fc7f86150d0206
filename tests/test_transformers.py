"""from_pretrained with no package for quantized checkpoints but quantkit: the same model as quantkit.load."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, MOE_FAMILIES, VOCAB
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, CompressedTensorsConfig, pipeline
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoQuantizationConfig

import quantkit
from quantkit.source import BUILTIN_PATH
from quantkit.transformers import registry
from quantkit.transformers.packed import PackedLinear

IDS = torch.arange(3, 43)[None] % VOCAB
RTN = {"scheme": "w4a16_g32_asym", "method": "rtn"}
pytestmark = pytest.mark.usefixtures("registered")


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model at 4 bits, with tokenizer."""
    path = tmp_path_factory.mktemp("embedded") / "q"
    quantkit.quantize("builtin", path, recipe={"scheme": "w4a16_g64", "method": "rtn"})
    return path


def opened(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, local_files_only=True, **options)


def quant_layers(model: Any) -> dict[str, quantkit.QuantLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, quantkit.QuantLinear)}


def all_tensors(path: Path) -> dict[str, Tensor]:
    return {name: t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}


def assert_same_files(written: Path, source: Path) -> None:
    """The same tensors, bit for bit, and the same quantization_config."""
    found, expected = all_tensors(written), all_tensors(source)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    configs = [json.loads((path / "config.json").read_text())["quantization_config"] for path in (written, source)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("family", [*FAMILIES, *MOE_FAMILIES])
@torch.no_grad()
def test_every_family_opens_runs_and_is_saved_again(family: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """The logits are those of quantkit.load to the last bit, and save_pretrained gives back the checkpoint."""
    quantkit.quantize(tiny(family), tmp_path / "q", recipe=RTN)
    model, expected = opened(tmp_path / "q"), quantkit.load(tmp_path / "q")
    assert quant_layers(model).keys() == quant_layers(expected).keys()
    assert torch.equal(model(IDS).logits, expected(IDS).logits)
    model.save_pretrained(tmp_path / "again")
    assert_same_files(tmp_path / "again", tmp_path / "q")
    assert torch.equal(opened(tmp_path / "again")(IDS).logits, expected(IDS).logits)


@pytest.mark.parametrize(
    "recipe",
    [
        {"scheme": "w8a8", "method": "rtn"},
        {"scheme": "w3a16_g32", "method": "rtn", "rules": [{"match": "lm_head", "scheme": "w8a16_g32"}]},
        {"scheme": "w4a16_g32", "method": "rtn", "rules": [{"match": "*.1.*", "skip": True}]},
        {"scheme": "w8a16_g32", "method": "rtn", "format": "gptq"},
        {"scheme": "w3a16_g32_asym", "method": "rtn", "format": "gptq_v2"},
        {"scheme": "w4a16_g32_asym", "method": "rtn", "format": "awq"},
    ],
    ids=["w8a8", "head", "mixed", "gptq", "gptq_v2", "awq"],
)
@torch.no_grad()
def test_other_schemes_and_formats(recipe: dict[str, Any], tiny: Callable[[str], Path], tmp_path: Path) -> None:
    quantkit.quantize(tiny("qwen2"), tmp_path / "q", recipe=recipe)
    model, expected = opened(tmp_path / "q"), quantkit.load(tmp_path / "q")
    assert torch.equal(model(IDS).logits, expected(IDS).logits)
    model.save_pretrained(tmp_path / "again")
    assert_same_files(tmp_path / "again", tmp_path / "q")


@pytest.mark.parametrize("name", ["torch_dtype", "dtype"])
def test_a_dtype_changes_activations_and_no_scale(name: str, embedded: Path, tmp_path: Path) -> None:
    model = opened(embedded, **{name: torch.float16})
    layer = next(iter(quant_layers(model).values()))
    assert model.dtype == layer.spec.dtype == torch.float16
    assert layer.quantized().scale.dtype == torch.bfloat16
    digests = {n: m.quantized().digest() for n, m in quant_layers(quantkit.load(embedded)).items()}
    assert {n: m.quantized().digest() for n, m in quant_layers(model).items()} == digests


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
@torch.no_grad()
def test_device_maps(device_map: Any, embedded: Path) -> None:
    model = opened(embedded, device_map=device_map)
    assert torch.equal(model(IDS).logits, quantkit.load(embedded)(IDS).logits)


@torch.no_grad()
def test_offloaded_layers_stay_on_disk_and_are_decoded_for_each_call(embedded: Path, tmp_path: Path) -> None:
    """Half of the blocks on disk: their packed tensors come and go; the other half runs on its backend."""
    places = {f"model.layers.{i}": "cpu" if i < 4 else "disk" for i in range(8)}
    places |= {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = opened(embedded, device_map=places, offload_folder=tmp_path / "offload", dtype=torch.float32)
    packed = {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert len(packed) == 28
    assert all(".layers." in name and int(name.split(".")[2]) >= 4 for name in packed)
    for _ in range(2):
        found = model(IDS).logits
        assert all(parameter.is_meta for m in packed.values() for parameter in m.parameters())
    torch.testing.assert_close(found, quantkit.load(embedded, dtype="float32")(IDS).logits, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    found_tensors, expected = all_tensors(tmp_path / "again"), all_tensors(embedded)
    assert all(torch.equal(found_tensors[n], t.to(found_tensors[n].dtype)) for n, t in expected.items())


def test_pipeline_generates_what_the_loaded_model_does(embedded: Path) -> None:
    generator = pipeline("text-generation", model=str(embedded))
    assert quant_layers(generator.model)
    (found,) = generator("The list is", max_new_tokens=8, do_sample=False)
    tokenizer: Any = generator.tokenizer
    ids = tokenizer("The list is", return_tensors="pt")["input_ids"]
    generate: Any = quantkit.load(embedded).generate
    expected = generate(ids, max_new_tokens=8, do_sample=False)
    assert found["generated_text"] == tokenizer.decode(expected[0], skip_special_tokens=True)


@torch.no_grad()
def test_without_the_head(embedded: Path) -> None:
    """AutoModel's names lack a prefix that the tensors have."""
    model: Any = AutoModel.from_pretrained(embedded, local_files_only=True)
    assert len(quant_layers(model)) == 56
    expected: Any = quantkit.load(embedded).get_decoder()
    assert torch.equal(model(IDS).last_hidden_state, expected(IDS).last_hidden_state)


@torch.no_grad()
def test_dequantize_gives_dense_layers(embedded: Path, tmp_path: Path) -> None:
    model = opened(embedded, dtype=torch.float32)
    before = model(IDS).logits
    model.dequantize()
    assert not quant_layers(model)
    torch.testing.assert_close(model(IDS).logits, before, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_contradicting_tensors_are_named(embedded: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(embedded, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 3
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(quantkit.CheckpointError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        opened(copy)


# The registry


FP8 = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}},
}


class Before(CompressedTensorsConfig):
    """Stands for the class of an installed package."""

    def __init__(self, **values: Any) -> None:
        self.values = values


def test_what_quantkit_does_not_run_goes_where_it_went(monkeypatch: pytest.MonkeyPatch, embedded: Path) -> None:
    quantkit.transformers.unregister()
    monkeypatch.setitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "compressed-tensors", Before)
    assert "compressed-tensors" in quantkit.transformers.register()
    assert type(AutoQuantizationConfig.from_dict(FP8)) is Before
    ours = json.loads((embedded / "config.json").read_text())["quantization_config"]
    assert AutoQuantizationConfig.from_dict(ours).to_dict() == ours
    assert type(AutoQuantizationConfig.from_dict(ours)) is not Before
    assert quantkit.transformers.register() == quantkit.transformers.register()
    quantkit.transformers.unregister()
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"] is Before
    assert type(AutoQuantizationConfig.from_dict(ours)) is Before


def test_where_nobody_runs_it_both_reasons_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing(Before):
        def __init__(self, **_: Any) -> None:
            raise ImportError("compressed-tensors is required")

    quantkit.transformers.unregister()
    monkeypatch.setitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "compressed-tensors", Missing)
    quantkit.transformers.register()
    both = (
        r"compressed-tensors is required \(quantkit does not run .*'float-quantized' is not read; quantkit reads pack"
    )
    with pytest.raises(ImportError, match=both):
        AutoQuantizationConfig.from_dict(FP8)


def test_an_installed_package_keeps_its_method_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    quantkit.transformers.unregister()
    monkeypatch.setitem(registry._OWN_PACKAGES, "compressed-tensors", lambda: True)
    assert "compressed-tensors" not in registry.claim(only_unread=True)
    assert "compressed-tensors" in registry.claim(only_unread=False)


def fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "imports",
    ["import quantkit\nimport transformers", "import transformers.quantizers.auto\nimport quantkit"],
    ids=["before", "after"],
)
def test_importing_quantkit_is_enough_where_no_other_package_is(imports: str, embedded: Path) -> None:
    """In whatever order; the finder is gone when it has done its work."""
    if find_spec("compressed_tensors") is not None:
        pytest.skip("compressed-tensors is installed here")
    code = (
        f"{imports}\nimport sys\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(embedded)!r})\n"
        "print(type(model.model.layers[0].mlp.up_proj).__module__)\n"
        "print([type(f).__name__ for f in sys.meta_path if type(f).__module__.startswith('quantkit')])\n"
    )
    assert fresh(code).splitlines() == ["quantkit.linear", "[]"]


@pytest.mark.parametrize("imports", ["import quantkit", "import transformers\nimport quantkit"])
def test_registering_may_be_the_first_use_of_transformers(imports: str, embedded: Path) -> None:
    code = (
        f"{imports}\nprint('compressed-tensors' in quantkit.transformers.register())\n"
        f"from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(embedded)!r})\n"
        "print(type(model.model.layers[0].mlp.up_proj).__module__)\n"
    )
    assert fresh(code).splitlines() == ["True", "quantkit.linear"]


def test_the_builtin_model_itself_is_dense() -> None:
    assert not quant_layers(opened(BUILTIN_PATH))
