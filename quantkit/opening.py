"""open_for_decoding(): a model as ``generate`` and ``bench`` run it, and what was done to it, in words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.joining import join_linears
from quantkit.loader import load
from quantkit.rounded_head import check_head_bits, round_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def open_for_decoding(
    model: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    backend: str | None = None,
    head_bits: int | None = None,
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Open a model, round its head where asked, and on a CPU join the layers that read the same input.

    Args:
        model, device, dtype, backend, head_bits: as for :func:`quantkit.load`.

    Returns:
        The model, and a line for what became of the head and for layers that could not be joined.

    Raises:
        As :func:`quantkit.load`.
    """
    check_head_bits(head_bits)
    opened = load(model, device=device, dtype=dtype, backend=backend)
    notes = [] if head_bits is None else [round_head(opened, head_bits, backend=backend)]
    if opened.device.type == "cpu":
        apart = join_linears(opened).apart
        if apart:
            notes.append(f"{len(apart)} groups of layers that read one input are not joined, such as {apart[0]}")
    return opened, tuple(notes)
