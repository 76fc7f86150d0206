"""A quantized checkpoint turned into the dense float32 checkpoint that has exactly its decoded weights.

    python -m quality.dense QUANTIZED ORIGINAL OUTPUT

Every program's weights then go through the same forward pass, whatever its own kernels round on the way. The layouts
are decoded here from their documentation, not by quantkit's code, which is one of the contestants: compressed-tensors
(pack-quantized and int-quantized), GPTQ (v1, v2, and AutoRound's spellings of both) and AWQ. A scale of bfloat16 or
float16 times an integer of at most 9 bits is exact in float32, so nothing is rounded.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_MARKS = ("weight_packed", "qweight", "weight_scale")  # one of these names a quantized layer
_PARTS = (
    *("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
    *("qweight", "qzeros", "scales", "g_idx", "input_scale", "input_zero_point"),
)
_ZERO_SHIFT = {"v1": 1, "v2": 0, "auto_round:auto_gptq": 1, "auto_round": 0}  # by which GPTQ's qzeros are too small
_AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds the column that stands here
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")


def write_dense(quantized: Path, original: Path, output: Path) -> int:
    """Write the dense twin of ``quantized``, with the tokenizer of ``original``. Returns the number of layers decoded.

    Raises:
        SystemExit: a layout that is not known here, or no quantized layer at all.
    """
    config = json.loads((quantized / "config.json").read_text())
    tensors = read_tensors(quantized)
    layers = sorted({name.rpartition(".")[0] for name in tensors if name.rpartition(".")[2] in _MARKS})
    if not layers:
        sys.exit(f"{quantized}: no quantized layer in it")
    decode = decoder(quantized, config.pop("quantization_config"))
    dense = {name: t.float() for name, t in tensors.items() if not _is_part(name, layers)}
    for layer in layers:
        parts = {name.rpartition(".")[2]: t for name, t in tensors.items() if name.rpartition(".")[0] == layer}
        dense[f"{layer}.weight"] = decode(parts)
    output.mkdir(parents=True)
    save_file({name: t.contiguous() for name, t in dense.items()}, output / "model.safetensors", {"format": "pt"})
    config["dtype"] = "float32"
    config.pop("torch_dtype", None)
    (output / "config.json").write_text(json.dumps(config, indent=2))
    for name in TOKENIZER:
        if (original / name).exists():
            shutil.copy(original / name, output / name)
    return len(layers)


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory's safetensors files."""
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def checkpoint_bytes(directory: Path) -> int:
    """Bytes of the directory's safetensors files."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def _is_part(name: str, layers: list[str]) -> bool:
    layer, _, last = name.rpartition(".")
    return layer in layers and last in (*_PARTS, "weight")


def decoder(where: Path, config: dict[str, Any]) -> Any:
    """The function that turns a layer's tensors into its float32 weight [out, in]."""
    method = config["quant_method"]
    if method == "compressed-tensors":
        groups = config["config_groups"].values()
        widths = {group["weights"]["num_bits"] for group in groups}
        if len(widths) != 1:
            sys.exit(f"{where}: layers of {sorted(widths)} bits; this study compares one width at a time")
        bits = widths.pop()
        return lambda parts: decode_compressed_tensors(parts, bits)
    packing = config.get("packing_format", {"gptq": "v1", "awq": "awq"}.get(method, ""))
    bits, group_size = int(config.get("bits", 0)), int(config.get("group_size", 0))
    if method == "gptq" and config.get("checkpoint_format") == "gptq_v2":
        packing = "v2"
    if method in ("gptq", "awq", "auto-round") and packing in _ZERO_SHIFT:
        return lambda parts: decode_gptq(parts, bits, group_size, _ZERO_SHIFT[packing])
    if method in ("awq", "auto-round") and packing in ("awq", "auto_round:auto_awq") and bits == 4:
        return lambda parts: decode_awq(parts, group_size)
    sys.exit(f"{where}: quant_method {method!r}, packing {packing!r} is no layout that this study decodes")


def decode_compressed_tensors(parts: dict[str, Tensor], bits: int) -> Tensor:
    """pack-quantized, or int-quantized where the weight is int8 as it stands; zero points along the outputs."""
    scale = parts["weight_scale"].float()
    if "weight_packed" not in parts:
        return parts["weight"].float() * scale
    rows, columns = parts["weight_shape"].tolist()
    codes = unpack(parts["weight_packed"], bits, columns).float()
    groups = scale.shape[1]
    if "weight_zero_point" in parts:
        zero = unpack(parts["weight_zero_point"].T, bits, rows).T.float()
    else:
        zero = torch.full((rows, groups), float(2 ** (bits - 1)))
    group_of = parts.get("weight_g_idx", torch.arange(columns) // (columns // groups)).long()
    return (codes - zero[:, group_of]) * scale[:, group_of]


def decode_gptq(parts: dict[str, Tensor], bits: int, group_size: int, zero_shift: int) -> Tensor:
    """GPTQ's layout, packed along the inputs; the zero points on disk are ``zero_shift`` too small (v1: 1)."""
    scale = parts["scales"].float()  # [groups, out]
    columns = parts["qweight"].shape[0] * 32 // bits
    codes = unpack(parts["qweight"].T, bits, columns).T.float()  # [in, out]
    zero = ((unpack(parts["qzeros"], bits, scale.shape[1]) + zero_shift) & (2**bits - 1)).float()
    group_of = parts.get("g_idx", torch.arange(columns) // group_size).long()
    weight: Tensor = (codes - zero[group_of]) * scale[group_of]
    return weight.T


def decode_awq(parts: dict[str, Tensor], group_size: int) -> Tensor:
    """AWQ's GEMM layout, 4 bits, packed along the outputs in an order of its own; zero points as they are."""
    place = torch.tensor(_AWQ_COLUMNS).argsort()  # of column i of eight, the nibble

    def nibbles(words: Tensor) -> Tensor:
        stored: Tensor = unpack(words, 4, words.shape[1] * 8).unflatten(1, (-1, 8))
        return stored[:, :, place].flatten(1).float()

    scale, codes, zero = parts["scales"].float(), nibbles(parts["qweight"]), nibbles(parts["qzeros"])
    group_of = torch.arange(len(codes)) // group_size
    transposed: Tensor = (codes - zero[group_of]) * scale[group_of]
    return transposed.T


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` codes in each row of int32 words [rows, words], low bits first: int32 [rows, count]."""
    raw = words.contiguous().numpy().view(np.uint8).reshape(words.shape[0], -1)
    stream = np.unpackbits(raw, axis=1, bitorder="little")[:, : count * bits].reshape(-1, count, bits)
    return torch.from_numpy((stream.astype(np.int32) << np.arange(bits, dtype=np.int32)).sum(axis=2, dtype=np.int32))


if __name__ == "__main__":
    print(write_dense(*(Path(argument) for argument in sys.argv[1:])), "layers")
