"""``quantkit tune``."""

from __future__ import annotations

from typing import Annotated

import typer

from quantkit.cli.options import Dtype, quiet, terminal
from quantkit.errors import KernelError, message


def tune(
    model: Annotated[str, typer.Argument(help="A quantized model: a directory or a hub id.")],
    device: Annotated[str, typer.Option(help="cuda or cuda:N.")] = "cuda",
    dtype: Dtype = "auto",
) -> None:
    """Measure the Triton kernels' tiles for a model on this GPU, and keep the fastest in a cache file."""
    import torch

    if not torch.cuda.is_available():
        raise KernelError(message("tune", "torch finds no CUDA device", "run it on the machine that serves the model"))
    from quantkit.kernels import TritonBackend, triton_tune
    from quantkit.kernels.tuned import cache_path, save
    from quantkit.linear import QuantLinear
    from quantkit.loader import load

    quiet()
    loaded = load(model, device=device, dtype=dtype)
    layers = {m.spec: m for m in loaded.modules() if isinstance(m, QuantLinear) and m.backend == "triton"}
    if not layers:
        raise KernelError(message(model, "no layer runs on the Triton backend", "see quantkit doctor for the reasons"))
    console = terminal()
    gpu, sms = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).multi_processor_count
    for spec, layer in layers.items():
        found, packed = [], TritonBackend().prepack(layer.quantized(), spec)
        for product in triton_tune.products(spec):
            choice = triton_tune.best(product, sms, triton_tune.measurer(product, packed))
            found.append(choice)
            before, after = 1e6 * choice.static_seconds, 1e6 * choice.seconds
            console.print(f"{spec}, up to {product.tokens} rows: {before:.1f} -> {after:.1f} us")
        save(gpu, found, cache_path())
    console.print(f"kept in {cache_path()}")
