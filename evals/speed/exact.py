"""What a program should compute: the logits of its own weights, as they are once dequantized, in float32.

Against these a program shows only the rounding of its arithmetic, however coarse its weights are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

import quantkit
from speed.gguf_file import gguf_name, in_order
from speed.workers.torch_decode import put_torchao


def exact_logits(path: Path, torchao: str, tokens: list[int], last: int) -> np.ndarray[Any, Any]:
    """float64 [last + 1, vocabulary]: the logits after each of the last tokens, and those before them.

    Args:
        path: a model directory that quantkit opens, or a GGUF file beside the directory that it was made of, ``dense``.
        torchao: none, int4 or int8: what torchao makes of a dense directory.
        tokens: of a text.
        last: how many of them.
    """
    if path.suffix == ".gguf":
        model: Any = quantkit.load(path.parent / "dense", device="cpu", dtype="float32")
        put_gguf(model, path)
    elif torchao != "none":
        model = quantkit.load(path, device="cpu", dtype="bfloat16")
        put_torchao(model, torchao)
        dense_again(model)
    else:
        model = quantkit.load(path, device="cpu", dtype="float32", backend=backend_of(path))
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0, -last - 1 :]
    return logits.double().numpy()


def backend_of(path: Path) -> str | None:
    """The reference for quantized directories; dense ones have no backend."""
    from quantkit.checkpoint import Checkpoint

    return None if Checkpoint(path).quantization is None else "reference"


def dense_again(model: nn.Module) -> None:
    """float32, with layers of torchao's as dense ones of the weights that their products with unit vectors show."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            with torch.inference_mode():
                weight = module(torch.eye(module.in_features, dtype=torch.bfloat16)).T.float().clone()
            dense = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            dense.weight = nn.Parameter(weight, requires_grad=False)
            model.set_submodule(name, dense)
    model.float()


def put_gguf(model: Any, path: Path) -> None:
    """The weights of a file in the place of a float32 model's; a file without a head has it tied."""
    import gguf

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    config = model.config.to_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = stored.pop(gguf_name(name))
            weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            cast(Tensor, parameter).copy_(in_order(name, weight, config).view_as(parameter))
    assert not stored, sorted(stored)
