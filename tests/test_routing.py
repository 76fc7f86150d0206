"""Experts through the pipeline: against a plain whole-model computation, token by token, on every family with them."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from families import MOE_FAMILIES, VOCAB, save_tiny
from safetensors.torch import load_file, save_file
from test_experts import random_experts, split_experts
from test_loader import IDS
from test_pipeline import decoded
from test_run import _Interrupt, files
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import quantkit
from quantkit.arch import find_blocks, find_linears
from quantkit.checkpoint import Checkpoint
from quantkit.cli import app
from quantkit.experts import SplitExperts, experts_info
from quantkit.grid import dequantize
from quantkit.layer_plan import LayerPlan
from quantkit.linear import QuantLinear
from quantkit.planning import make_plan
from quantkit.qtensor import QuantizedTensor
from quantkit.recipe import make_recipe
from quantkit.routing import ExpertInputs, expert_groups
from quantkit.run import execute, prepare
from quantkit.scheme import QuantScheme
from quantkit.skeleton import LinearInfo
from quantkit.solvers import Solution
from quantkit.source import BUILTIN_PATH
from quantkit.staging import partial_path
from quantkit.stats import LayerStats, Stat

SCHEME = QuantScheme(4, 32)
RECIPE = {"scheme": "w4a16_g32", "method": "gptq"}
RTN = {"scheme": "w4a16_g32", "method": "rtn"}
LEAVES = {"mixtral": ("w1", "w3", "w2")}
HESSIAN = frozenset({Stat.HESSIAN})
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def many() -> list[Tensor]:
    """Enough tokens that most experts are solved and some are not."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB, (length,), generator=generator) for length in (96, 80, 48, 66, 96)]


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    """Family, and whether its experts are stacked on disk -> directory of a tiny model with experts."""
    root = tmp_path_factory.mktemp("sparse")

    def saved(family: str, stacked: bool = False) -> Path:
        path = root / f"{family}-{stacked}"
        return path if path.exists() else save_tiny(family, path, stacked=stacked)

    return saved


class Reference:
    """GPTQ of every layer as one would write it with the whole model in memory, experts one token at a time.

    Args:
        path: the dense model.
        samples: token ids.
        outcome: layer -> the weight that the layers behind it are to see in its place.
        tokens_per_column: experts with fewer tokens are rounded to nearest.
        sequential: every layer is measured behind the layers before it as they are when quantized.
    """

    def __init__(
        self,
        path: Path,
        samples: Sequence[Tensor],
        outcome: dict[str, QuantizedTensor],
        tokens_per_column: float,
        sequential: bool = False,
    ) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.model.config._experts_implementation = "eager"
        self.samples, self.outcome, self.tokens_per_column = samples, outcome, tokens_per_column
        self.sequential = sequential
        self.solved: dict[str, QuantizedTensor] = {}
        self.seen: dict[str, int] = {}
        self.by_rtn: set[str] = set()

    @torch.no_grad()
    def run(self) -> Reference:
        found = find_blocks(self.model)
        assert found is not None
        for index, block in enumerate(found.blocks):
            modules = {n: m for n, m in find_linears(block).items() if not n.endswith("shared_expert_gate")}
            modules.update((n, m) for n, m in block.named_modules() if n.endswith("mlp.experts"))
            at_once = [{name: module} for name, module in modules.items()] if self.sequential else [modules]
            for local, calls in (item for some in at_once for item in self._calls_of(some).items()):
                name, module = f"{found.path}.{index}.{local}", modules[local]
                if local.endswith("experts"):
                    self._solve_experts(name, module, calls)
                else:
                    weight: Any = module.weight
                    x = torch.cat([args[0].reshape(-1, weight.shape[1]) for args in calls])
                    weight.copy_(self._solve(name, weight, x))
        return self

    def _calls_of(self, modules: dict[str, nn.Module]) -> dict[str, list[Any]]:
        """The arguments of every call of these modules, over all samples."""
        calls: dict[str, list[Any]] = {name: [] for name in modules}
        handles = [
            module.register_forward_pre_hook(lambda _, args, name=name: calls[name].append(args))
            for name, module in modules.items()
        ]
        for sample in self.samples:
            self.model(input_ids=sample[None], use_cache=False)
        for handle in handles:
            handle.remove()
        return calls

    def _solve_experts(self, name: str, experts: Any, calls: list[Any]) -> None:
        for e in range(experts.gate_up_proj.shape[0]):
            rows = [x[t] for x, chosen, _ in calls for t in range(len(x)) if e in chosen[t].tolist()]
            x = torch.stack(rows) if rows else torch.empty(0, experts.gate_up_proj.shape[2])
            gate, up = experts.gate_up_proj[e].chunk(2)
            inner = nn.functional.silu(x @ gate.T) * (x @ up.T)
            solved = [self._solve(f"{name}.{e}.{n}_proj", w, x) for n, w in (("gate", gate), ("up", up))]
            experts.gate_up_proj[e] = torch.cat(solved)
            if self.sequential:
                inner = nn.functional.silu(x @ solved[0].T) * (x @ solved[1].T)
            experts.down_proj[e] = self._solve(f"{name}.{e}.down_proj", experts.down_proj[e], inner)

    def _solve(self, name: str, weight: Tensor, x: Tensor) -> Tensor:
        self.seen[name] = len(x)
        if ".experts." in name and len(x) < max(1.0, self.tokens_per_column * weight.shape[1]):
            self.by_rtn.add(name)
            self.solved[name] = quantkit.RTN().solve(weight.float(), SCHEME, None, torch.float32).weight
        else:
            stats = LayerStats(weight.shape[1], HESSIAN, CPU)
            stats.update(x)
            self.solved[name] = quantkit.GPTQ().solve(weight.float(), SCHEME, stats, torch.float32).weight
        return dequantize(self.outcome[name])


def on_disk(family: str, name: str, stacked: bool) -> str:
    """The disk's name of a layer: what the hub's checkpoints of the family call it."""
    owner, _, leaf = name.rpartition(".")
    if ".mlp.experts." in name and family in LEAVES:
        leaf = dict(zip(("gate_proj", "up_proj", "down_proj"), LEAVES[family], strict=True))[leaf]
        owner = owner if stacked else owner.replace(".mlp.", ".block_sparse_moe.")
    return f"{owner}.{leaf}"


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_streaming_equals_whole_model(
    family: str, stacked: bool, sparse: Callable[..., Path], many: list[Tensor], tmp_path: Path
) -> None:
    """Every expert is solved from the tokens that reached it, behind quantized blocks, from either disk form."""
    recipe = {**RECIPE, "expert_tokens_per_column": 2.5}
    result = quantkit.quantize(sparse(family, stacked), tmp_path / "out", recipe=recipe, tokens=many)
    records = {layer["name"]: layer for layer in result.report["layers"]}
    disk = {name: on_disk(family, name, stacked) for name in records}
    shapes = {disk[name]: tuple(record["shape"]) for name, record in records.items()}
    written = decoded(tmp_path / "out", dict.fromkeys(shapes, SCHEME), shapes)
    found = {name: written[disk[name]] for name in records}
    reference = Reference(sparse(family, stacked), many, found, tokens_per_column=2.5).run()
    assert_same_rows(found, reference.solved)
    for name in reference.solved:
        assert records[name]["num_tokens"] == reference.seen[name]
        assert records[name]["method"] == ("rtn" if name in reference.by_rtn else "gptq")
    assert 0 < len(reference.by_rtn) < len(reference.solved) / 2
    assert any(f"{len(reference.by_rtn)} of {len(records)} layers" in note for note in result.report["notes"])
    for name in reference.by_rtn:
        assert "its expert saw" in records[name]["notes"][0]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_true_sequential_equals_whole_model(
    family: str, sparse: Callable[..., Path], many: list[Tensor], tmp_path: Path
) -> None:
    """Experts are measured behind the block's quantized attention, and down behind the quantized gate and up."""
    recipe = {**RECIPE, "expert_tokens_per_column": 2.5, "true_sequential": True}
    prepared = prepare(sparse(family), tmp_path / "out", recipe=recipe, tokens=many)
    passes: list[int] = []
    prepared.plan.skeleton.blocks[1].register_forward_pre_hook(lambda *_: passes.append(1))
    result = execute(prepared)
    records = {layer["name"]: layer for layer in result.report["layers"]}
    disk = {name: on_disk(family, name, False) for name in records}
    shapes = {disk[name]: tuple(record["shape"]) for name, record in records.items()}
    written = decoded(tmp_path / "out", dict.fromkeys(shapes, SCHEME), shapes)
    found = {name: written[disk[name]] for name in records}
    reference = Reference(sparse(family), many, found, tokens_per_column=2.5, sequential=True).run()
    assert_same_rows(found, reference.solved)
    assert len(passes) == prepared.plan.forward_passes * len(many) + 1  # one sample shows who shares an input


def assert_same_rows(found: dict[str, QuantizedTensor], expected: dict[str, QuantizedTensor]) -> None:
    """Sums in another order can move a code that lies on the edge between two, and with it what follows in its row."""
    assert found.keys() == expected.keys()
    for name, q in expected.items():
        rows = (found[name].codes != q.codes).any(-1)
        assert float(rows.float().mean()) <= 0.05, f"{name}: {int(rows.sum())} of {len(rows)} rows differ"


@dataclass(frozen=True)
class Drifting:
    """A solver that asks for the full-precision model's inputs as well."""

    name: str = "drifting"
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.HESSIAN, Stat.DRIFT})
    writes_g_idx: bool = False

    def solve(self, weight: Tensor, scheme: QuantScheme, stats: LayerStats | None, dtype: torch.dtype) -> Solution:  # noqa: ARG002
        raise AssertionError("not called")


@pytest.mark.parametrize("sequential", [False, True])
@torch.no_grad()
def test_drift_of_experts(sequential: bool, tmp_path: Path) -> None:
    """The full-precision tokens are those at the places of the measured ones, through the full-precision weights."""
    stacked = random_experts(3, 8, 6, torch.float32)
    info = experts_info("mlp.experts", stacked)
    before = stacked.gate_up_proj.clone()
    experts = split_experts(stacked, info)
    plans = [
        LayerPlan(
            LinearInfo(s.name, s.name, s.name, s.out_features, s.in_features, False, 0, False, expert=s),
            QuantScheme(4, None),
            Drifting(),
        )
        for s in info.slots()
    ]
    generator = torch.Generator().manual_seed(0)
    inputs = ExpertInputs(info, experts, [5, 4], torch.float32, 2**20, tmp_path, with_reference=True)
    x, exact = torch.randn(2, 9, 8, generator=generator)
    chosen = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(9)])
    with inputs.hooked():
        for rows in (slice(0, 5), slice(5, 9)):
            with inputs.of_reference():  # the reference may have gone to other experts: that is not looked at
                experts(
                    exact[rows], top_k_index=torch.zeros(len(exact[rows]), 2).long(), top_k_weights=torch.ones(9, 2)
                )
            experts(x[rows], chosen[rows], torch.ones(9, 2))
    for group, stats in expert_groups(plans, inputs, 0.0, sequential):
        assert stats is not None
        slot = group[0].info.expert
        assert slot is not None
        seen = [t for t in range(9) if slot.index in chosen[t].tolist()]
        a, b = x[seen], exact[seen]
        if slot.leaf == "down_proj":
            gate, up = experts.gate_up(slot.index) if sequential else before[slot.index].chunk(2)
            a = nn.functional.silu(a @ gate.T) * (a @ up.T)
            gate, up = before[slot.index].chunk(2)
            b = nn.functional.silu(b @ gate.T) * (b @ up.T)
        assert stats.num_tokens == len(seen)
        torch.testing.assert_close(stats.hessian, 2 / len(seen) * a.T @ a, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stats.drift, 2 / len(seen) * (b - a).T @ a, rtol=1e-4, atol=1e-5)
        for layer in group:  # as the pipeline does: what is solved takes the weight's place at once
            assert layer.info.expert is not None
            linear: Any = experts.get_submodule(f"{layer.info.expert.index}.{layer.info.expert.leaf}")
            linear.weight = nn.Parameter(linear.weight.round(), requires_grad=False)
    inputs.close()


@pytest.mark.parametrize(("calls", "text"), [(0, "never ran"), (3, "quantkit cannot run this model")])
def test_experts_called_another_number_of_times(calls: int, text: str, tmp_path: Path) -> None:
    stacked = random_experts(2, 4, 4, torch.float32)
    info = experts_info("mlp.experts", stacked)
    experts = split_experts(stacked, info)
    inputs = ExpertInputs(info, experts, [3, 3], torch.float32, 2**20, tmp_path)

    def run() -> None:
        for _ in range(calls):
            experts(torch.ones(3, 4), torch.zeros(3, 1).long(), torch.ones(3, 1))
        list(inputs.of_expert(0))

    with inputs.hooked(), pytest.raises(quantkit.QuantkitError, match=text):
        run()


def test_both_disk_forms_give_the_same_bytes(sparse: Callable[..., Path], many: list[Tensor], tmp_path: Path) -> None:
    for stacked in (False, True):
        quantkit.quantize(sparse("qwen3_moe", stacked), tmp_path / str(stacked), recipe=RECIPE, tokens=many)
    for shard in sorted((tmp_path / "False").glob("*.safetensors")):
        assert shard.read_bytes() == (tmp_path / "True" / shard.name).read_bytes()
    assert Checkpoint(sparse("qwen3_moe", True)).tensors.keys() != Checkpoint(sparse("qwen3_moe")).tensors.keys()


@pytest.mark.parametrize("family", MOE_FAMILIES)
@torch.no_grad()
def test_loaded_model_equals_the_dequantized_one(family: str, sparse: Callable[..., Path], tmp_path: Path) -> None:
    """Logits, and generation; no stacked weights are left in the model."""
    quantkit.quantize(sparse(family), tmp_path / "q", recipe={"scheme": "w4a16_g32_asym", "method": "rtn"})
    model: Any = quantkit.load(tmp_path / "q")
    dense: Any = AutoModelForCausalLM.from_pretrained(sparse(family), dtype=torch.float32)
    split = {name: module for name, module in model.named_modules() if isinstance(module, SplitExperts)}
    assert split
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            owner, _, leaf = name.rpartition(".")
            experts, _, index = owner.rpartition(".")
            if experts in split:
                stack = dense.get_submodule(experts)
                inner = stack.down_proj.shape[2]
                rows = {"gate_proj": slice(0, inner), "up_proj": slice(inner, None), "down_proj": slice(None)}[leaf]
                (stack.down_proj if leaf == "down_proj" else stack.gate_up_proj)[int(index), rows] = layer.dequantize()
            else:
                dense.get_submodule(name).weight.copy_(layer.dequantize())
    torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-5)
    assert not any(p.ndim > 2 for p in model.parameters())
    generated = [m.generate(IDS[:, :5], max_new_tokens=6, do_sample=False) for m in (model, dense)]
    assert torch.equal(*generated)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_resume_after_any_event(family: str, sparse: Callable[..., Path], many: list[Tensor], tmp_path: Path) -> None:
    whole = _Interrupt(None)
    model = sparse(family, family == "deepseek_v3")
    quantkit.quantize(model, tmp_path / "whole", recipe=RECIPE, tokens=many, observer=whole)
    expected = files(tmp_path / "whole")
    notes = json.loads((tmp_path / "whole" / "report.json").read_text())["notes"]
    for at in range(20, whole.events + 1, 31):
        out = tmp_path / f"stopped-{at}"
        with pytest.raises(KeyboardInterrupt):
            quantkit.quantize(model, out, recipe=RECIPE, tokens=many, observer=_Interrupt(at))
        quantkit.quantize(model, out, recipe=RECIPE, tokens=many, resume=True)
        assert files(out) == expected
        assert json.loads((out / "report.json").read_text())["notes"] == notes
        assert not partial_path(out).exists()


def test_resume_behind_experts_that_are_kept(sparse: Callable[..., Path], many: list[Tensor], tmp_path: Path) -> None:
    """A finished block's experts are run again as they are on disk, whether quantized or not."""
    rules = [{"match": "*.0.mlp.experts.1.*", "skip": True}, {"match": "*.0.mlp.experts.2.down_proj", "skip": True}]
    recipe = {**RECIPE, "rules": rules}
    quantkit.quantize(sparse("qwen3_moe", True), tmp_path / "whole", recipe=recipe, tokens=many)
    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        quantkit.quantize(sparse("qwen3_moe", True), out, recipe=recipe, tokens=many, observer=_Interrupt(25))
    assert len(list(partial_path(out).glob("model-*.safetensors"))) == 1
    quantkit.quantize(sparse("qwen3_moe", True), out, recipe=recipe, tokens=many, resume=True)
    assert files(out) == files(tmp_path / "whole")


def test_perplexity(tmp_path: Path) -> None:
    """The command runs models with experts, dense and quantized."""
    vocab = json.loads((BUILTIN_PATH / "config.json").read_text())["vocab_size"]
    model = save_tiny("deepseek_v3", tmp_path / "model", vocab_size=vocab)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILTIN_PATH / name, model / name)
    quantkit.quantize(model, tmp_path / "q", recipe=RTN)
    arguments = ["perplexity", str(model), str(tmp_path / "q"), "--sequence-length", "16", "--limit", "2"]
    result = CliRunner().invoke(app, [*arguments, "--json", str(tmp_path / "found.json")])
    assert result.exit_code == 0, result.output
    dense, quantized = json.loads((tmp_path / "found.json").read_text())["results"]
    assert quantized["perplexity"] == pytest.approx(dense["perplexity"], rel=0.05)
    assert quantized["perplexity"] != dense["perplexity"]


def test_an_expert_that_nobody_chose(sparse: Callable[..., Path], many: list[Tensor], tmp_path: Path) -> None:
    """It is rounded to nearest, also where the recipe wants no number of tokens, and said so."""
    tensors = load_file(sparse("deepseek_v3") / "model.safetensors")
    tensors["model.layers.1.mlp.gate.e_score_correction_bias"][3] = -100.0
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_bytes((sparse("deepseek_v3") / "config.json").read_bytes())
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    result = quantkit.quantize(model, tmp_path / "q", recipe={**RECIPE, "expert_tokens_per_column": 0}, tokens=many)
    rounded = [layer for layer in result.report["layers"] if layer["method"] == "rtn"]
    assert [layer["name"].rpartition(".experts.")[2] for layer in rounded] == [
        "3.gate_proj",
        "3.up_proj",
        "3.down_proj",
    ]
    assert all(list(layer["notes"]) == ["gptq wants 1 tokens, and its expert saw 0"] for layer in rounded)
    assert all(layer["num_tokens"] == 0 for layer in rounded)
    assert any("3 of 72 layers are rounded to nearest" in n and "(3 saw none)" in n for n in result.report["notes"])


@pytest.mark.parametrize(("per_column", "rounded"), [(0, 0), (1e6, 72 - 24)])
def test_threshold(
    per_column: float, rounded: int, sparse: Callable[..., Path], many: list[Tensor], tmp_path: Path
) -> None:
    """Of the recipe; only experts fall back to rounding, whatever it is."""
    recipe = {**RECIPE, "expert_tokens_per_column": per_column}
    result = quantkit.quantize(sparse("deepseek_v3"), tmp_path / "q", recipe=recipe, tokens=many)
    by_rtn = [layer["name"] for layer in result.report["layers"] if layer["method"] == "rtn"]
    assert len(by_rtn) == rounded
    assert all(".mlp.experts." in name for name in by_rtn)
    with pytest.raises(quantkit.RecipeError, match="expert_tokens_per_column"):
        make_recipe({"expert_tokens_per_column": -1})


def test_mapped_inputs_give_the_same_bytes(sparse: Callable[..., Path], many: list[Tensor], tmp_path: Path) -> None:
    """Experts' inputs over the budget go to a file, which is gone afterwards, and change nothing."""
    quantkit.quantize(sparse("qwen2_moe"), tmp_path / "memory", recipe=RECIPE, tokens=many)
    for budget in (0, sum(map(len, many)) * 64 * 4):  # nothing fits; only the hidden states do
        out = tmp_path / str(budget)
        quantkit.quantize(sparse("qwen2_moe"), out, recipe={**RECIPE, "activation_memory": budget}, tokens=many)
        for shard in sorted((tmp_path / "memory").glob("*.safetensors")):
            assert shard.read_bytes() == (out / shard.name).read_bytes()
        assert not list(out.glob("*.bin"))


def test_one_expert_is_measured_at_a_time(
    sparse: Callable[..., Path], many: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many experts a block has, of theirs only the two Hessians of one expert are held."""
    alive: weakref.WeakSet[LayerStats] = weakref.WeakSet()
    held: list[int] = []

    class Counted(LayerStats):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            alive.add(self)
            held.append(len(alive))

    monkeypatch.setattr("quantkit.routing.LayerStats", Counted)
    quantkit.quantize(sparse("deepseek_v3"), tmp_path / "q", recipe=RECIPE, tokens=many)
    assert len(held) == 2 * 8 * 2  # two inputs of eight experts in two blocks
    assert max(held) <= 4  # the next expert's are made before the last one's are let go


def test_projected_peak_memory_grows_by_the_weights_of_experts_alone(tmp_path: Path) -> None:
    sizes = {}
    for experts in (4, 8):
        model = save_tiny("qwen3_moe", tmp_path / str(experts), num_experts=experts)
        plan = make_plan(Checkpoint(model), make_recipe(RECIPE))
        sizes[experts] = plan.peak_memory(1000, 100)
        assert plan.size_after == plan.checkpoint.nbytes - sum(p.numel * 4 for p in plan.layers) + plan.quantized_bytes
    assert sizes[8] - sizes[4] == 2 * 4 * (4 * 3 * 64 * 32 + 4 * 64)  # read, and in the block: experts and router rows
    recipe = make_recipe({**RECIPE, "activation_memory": 0})
    small = make_plan(Checkpoint(tmp_path / "8"), recipe)
    assert sizes[8] - small.peak_memory(1000, 100) == 2 * 1000 * 64 * 4  # hidden states, and those in front of experts
    assert small.mapped_bytes(1000) == 2 * 1000 * 64 * 4
    rtn = make_plan(Checkpoint(tmp_path / "8"), make_recipe({**RECIPE, "method": "rtn"}))
    assert rtn.expert_bytes(1000) == rtn.mapped_bytes(1000) == 0


@torch.no_grad()
def test_some_experts_kept(sparse: Callable[..., Path], many: list[Tensor], tmp_path: Path) -> None:
    """Rules name single experts; what is kept of a stack becomes single tensors, and it is said who cannot load it."""
    rules = [
        {"match": "*.0.mlp.experts.2.*", "skip": True},
        {"match": "*.1.mlp.experts.*", "skip": True},
        {"match": "*.mlp.experts.*.down_proj", "scheme": "w8a16_g32", "method": "rtn"},
    ]
    outputs = {}
    for stacked in (False, True):
        out = tmp_path / str(stacked)
        recipe = {**RECIPE, "rules": rules}
        report = quantkit.quantize(sparse("mixtral", stacked), out, recipe=recipe, tokens=many).report
        assert sum("runs one scheme for all experts of a block" in note for note in report["notes"]) == 1
        assert sum("transformers 5.23.0: takes all experts as quantized" in note for note in report["notes"]) == 1
        outputs[stacked] = quantkit.load(out)(IDS).logits
        prefix = "model.layers.1." + ("mlp" if stacked else "block_sparse_moe")
        assert Checkpoint(out).tensors[f"{prefix}.experts.1.w3.weight"].shape == (96, 64)
        config = json.loads((out / "config.json").read_text())["quantization_config"]
        assert "model.layers.0.mlp.experts.2.up_proj" in config["ignore"]
        assert f"{prefix}.experts.0.gate_proj" in config["ignore"]  # vLLM's name
        assert f"{prefix}.gate" in config["ignore"]
    assert torch.equal(*outputs.values())


def test_one_scheme_of_experts_is_one_pattern(sparse: Callable[..., Path], tmp_path: Path) -> None:
    """Beside other schemes; transformers looks for the pattern, and shared experts are not meant by it."""
    rules = [{"match": "*.self_attn.*", "scheme": "w8a16_g32"}]
    report = quantkit.quantize(sparse("deepseek_v3"), tmp_path / "q", recipe={**RTN, "rules": rules}).report
    assert report["notes"] == []
    groups = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["config_groups"]
    targets = {group["weights"]["num_bits"]: group["targets"] for group in groups.values()}
    (pattern,) = [target for found in targets.values() for target in found if target.startswith("re:")]
    assert pattern in targets[4]
    assert re.match(pattern[3:], "model.layers.1.block_sparse_moe.experts.0.gate_proj")
    assert not re.match(pattern[3:], "model.layers.1.mlp.shared_experts.gate_proj")
    plain = quantkit.quantize(sparse("deepseek_v3"), tmp_path / "plain", recipe={**RTN, "scheme": "w3a16_g32"}).report
    assert [note.rpartition(": ")[0] for note in plain["notes"]] == [
        "vllm 0.33.0, sglang 0.5.23: runs experts of 4 or 8 bits only",
        "sglang 0.5.23: runs compressed-tensors weights of 4 or 8 bits only",
    ]
    config = json.loads((tmp_path / "plain" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]


def test_routers_stay(sparse: Callable[..., Path]) -> None:
    """They are no linear layers in most families; where they are, only a rule quantizes them."""
    plan = make_plan(Checkpoint(sparse("qwen2_moe")), make_recipe({**RECIPE, "method": "rtn"}))
    routers = {name: reason for name, reason in plan.skipped if reason == "routers stay as they are"}
    assert sorted(routers) == [f"model.layers.{i}.mlp.{n}" for i in (0, 2) for n in ("gate", "shared_expert_gate")]
    assert set(routers) <= set(plan.ignored)
    rules = [{"match": "*.shared_expert_gate", "scheme": "w8a16_g32"}, {"match": "*.mlp.gate", "skip": True}]
    asked = make_plan(Checkpoint(sparse("qwen2_moe")), make_recipe({**RECIPE, "method": "rtn", "rules": rules}))
    assert len(asked.layers) == len(plan.layers) + 2
    with pytest.raises(quantkit.RecipeError, match=r"'\*\.mlp\.gate' matches no linear layer"):
        make_plan(
            Checkpoint(sparse("qwen2_moe")),
            make_recipe({**RECIPE, "rules": [{"match": "*.mlp.gate", "scheme": "w8a16_g32"}]}),
        )


def test_experts_that_cannot_be_quantized(tmp_path: Path) -> None:
    """They are most of a model, so that they stay only when a rule says so."""
    from transformers import AutoConfig

    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        "gpt_oss", **sizes, vocab_size=VOCAB, num_key_value_heads=2, num_local_experts=4, head_dim=16
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    with pytest.raises(quantkit.RecipeError, match="GptOssExperts cannot be quantized: gate and up are interleaved"):
        prepare(tmp_path / "model", tmp_path / "q", recipe={**RECIPE, "method": "rtn"})
    rules = [{"match": "model.layers.*.mlp.experts", "skip": True}]
    quantkit.quantize(tmp_path / "model", tmp_path / "q", recipe={**RECIPE, "method": "rtn", "rules": rules})
    dense: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(quantkit.load(tmp_path / "q")(IDS).logits, dense(IDS).logits, rtol=0.2, atol=0.2)


def test_contradictory_stacks(sparse: Callable[..., Path], tmp_path: Path) -> None:
    """Wrong shapes, lost experts, and more experts than the config has are refused by name."""
    config = json.loads((sparse("qwen3_moe") / "config.json").read_text())
    tensors = load_file(sparse("qwen3_moe") / "model.safetensors")
    stacked = load_file(sparse("qwen3_moe", True) / "model.safetensors")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    stack = "model.layers.1.mlp.experts.gate_up_proj"
    for bad, text in (
        ({**tensors, name: tensors[name][:-1].contiguous()}, r"up_proj.weight is \[31, 64\] and should be \[32, 64\]"),
        ({n: t for n, t in tensors.items() if n != name}, r"experts\.2\.up_proj\.weight is missing"),
        ({**tensors, name.replace(".2.", ".7."): tensors[name].clone()}, "is of expert 7; .* has 5"),
        ({**stacked, stack: stacked[stack][:4].contiguous()}, r"gate_up_proj: is \[4, 64, 64\]"),
        ({**stacked, name: tensors[name]}, "are both there"),
    ):
        path = tmp_path / "bad"
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps(config))
        save_file(bad, path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(quantkit.CheckpointError, match=text):
            prepare(path, tmp_path / "q", recipe={**RECIPE, "method": "rtn"})
