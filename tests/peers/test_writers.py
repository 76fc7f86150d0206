"""Checkpoints that llm-compressor, GPTQModel and AutoRound write load in quantkit with the same decoded weights.

Each program quantizes the embedded model in its own environment (make test-peer-writers). quantkit's decoded weights
are compared with those of an independent decoder, in numpy, to the last bit in float32, and with the weights that the
program itself multiplies by, in its bfloat16. Seen with llm-compressor 0.14, GPTQModel 7.7 and AutoRound 0.16.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peer_programs import REPOSITORY, run
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.checkpoint import Checkpoint
from quantkit.formats import format_of
from quantkit.grid import dequantize
from quantkit.skeleton import open_skeleton
from quantkit.source import BUILTIN_PATH
from quantkit.stored import stored_layers

pytestmark = pytest.mark.peer

DRIVERS = REPOSITORY / "evals" / "quality" / "peers"
LAYER = "model.layers.1.mlp.down_proj"


@dataclass(frozen=True)
class Written:
    """What a program is asked for, and what quantkit should find."""

    program: str
    scheme: str
    recipe: str
    format: str
    found: str
    equal: float | None = 1.0
    """Share of the program's own bfloat16 weights that are quantkit's; None: it does not load its own file."""


CASES = (
    Written("llmcompressor", "w4_sym", "rtn", "compressed-tensors", "w4a16_g64_sym"),
    Written("llmcompressor", "w4_asym", "gptq", "compressed-tensors", "w4a16_g64_asym"),
    Written("llmcompressor", "w8a8", "rtn", "compressed-tensors", "w8a8_channel_sym"),
    Written("gptqmodel", "w4_sym", "gptq", "gptq", "w4a16_g64_sym"),
    # With reordered groups it computes the weight in another order, and rounds 1 % of it otherwise in the last bit.
    Written("gptqmodel", "w3_asym", "gptq-act-order", "gptq", "w3a16_g64_asym", equal=0.98),
    Written("autoround", "w4_sym", "rtn", "gptq", "w4a16_g64_sym", equal=None),
    Written("autoround", "w4_asym", "rtn", "awq", "w4a16_g64_asym", equal=None),
    Written("autoround", "w3_asym", "rtn", "gptq_v2", "w3a16_g64_asym"),
)


@pytest.fixture(autouse=True)
def evals_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "evals"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.program}-{case.scheme}-{case.recipe}")
def test_the_same_decoded_weights(case: Written, tmp_path: Path) -> None:
    from quality.dense import decoder, read_tensors

    tokens = torch.randint(2048, (4, 128), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": tokens}, tmp_path / "tokens")
    asked = ("--scheme", case.scheme, "--recipe", case.recipe, "--output", str(tmp_path / "q"))
    inputs = ("--model", str(BUILTIN_PATH), "--tokens", str(tmp_path / "tokens"))
    run(case.program, str(DRIVERS / f"{case.program}_run.py"), *inputs, *asked, cwd=tmp_path)
    path = next((tmp_path / "q").rglob("config.json")).parent

    checkpoint = Checkpoint(path)
    config = checkpoint.quantization
    assert config is not None
    fmt = format_of(config)
    skeleton = open_skeleton(checkpoint, torch.bfloat16)
    stored = stored_layers(skeleton, fmt, config)
    assert (fmt.name, {str(scheme) for scheme in stored.schemes.values()}) == (case.format, {case.found})
    assert len(stored.schemes) == 7 * len(skeleton.blocks)
    decode, tensors = decoder(path, config), read_tensors(path)
    for info in skeleton.linears:
        if info.name in stored.schemes:
            parts = {n.rpartition(".")[2]: t for n, t in tensors.items() if n.rpartition(".")[0] == info.stem}
            assert torch.equal(dequantize(stored.read(info)[0], torch.float32), decode(parts)), info.name
    assert bool(torch.isfinite(quantkit.load(path)(tokens[:1, :16]).logits).all())
    if case.equal is not None:
        run(case.program, str(DRIVERS / "forward.py"), str(path), LAYER, str(tmp_path / "weight"), cwd=tmp_path)
        theirs = load_file(tmp_path / "weight")["weight"]
        info = next(info for info in skeleton.linears if info.name == LAYER)
        mine = dequantize(stored.read(info)[0], torch.bfloat16)
        assert float((theirs == mine).float().mean()) >= case.equal
        step = mine.abs().clamp(min=2.0**-126) * 2.0**-7  # one unit in the last place of bfloat16
        assert bool(((theirs.float() - mine.float()).abs() <= step.float()).all())
