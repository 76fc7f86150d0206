"""A model's output head rounded when it is loaded: the product reads a quantized copy, the embedding stays as it is.

Decoding reads the whole head for every token: 28 of the 135 million parameters of SmolLM2, half of the bytes that a
step reads where the blocks have 4 bits and the head 16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.errors import InputError, KernelError, message
from quantkit.linear import QuantLinear
from quantkit.scheme import MAX_BITS, MIN_BITS, QuantScheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WHERE = "head_bits"


def check_head_bits(bits: int | None) -> None:
    """None, or a width that codes have.

    Raises:
        InputError: neither.
    """
    if bits is not None and not MIN_BITS <= bits <= MAX_BITS:
        raise InputError(message(_WHERE, f"{bits} is not a width", f"choose {MIN_BITS} to {MAX_BITS}"))


def round_head(model: PreTrainedModel, bits: int, *, backend: str | None = None) -> str:
    """Put a QuantLinear in the place of the output head, by rounding to nearest with one scale a row (token).

    Of a head that is tied to the embedding, the embedding keeps the weight. A head that is quantized already stays.

    Args:
        model: a causal language model; its head is replaced in place.
        bits: of a code, 2 to 8.
        backend: a kernel backend by name; None is the first that can run the head.

    Returns:
        What was done, in one line.

    Raises:
        InputError: bits out of range, or no linear head.
        SchemeError: a weight that is not finite.
        KernelError: no backend can run it.
    """
    check_head_bits(bits)
    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), None)
    if head is None or name is None:
        what = f"{type(model).__name__} has no output head"
        raise InputError(message(_WHERE, what, "leave it out"))
    if isinstance(head, QuantLinear):
        return f"{name}: quantized in the checkpoint ({head.scheme}), which stays; head_bits={bits} changes nothing"
    scheme = QuantScheme(bits, None)
    try:
        layer = QuantLinear.from_linear(head, scheme, backend=backend)
    except (InputError, KernelError) as error:
        raise type(error)(f"{name}: {error}") from error
    embedding = model.get_input_embeddings()
    tied = getattr(embedding, "weight", None) is head.weight
    model.set_submodule(name, layer)
    size = sum(tensor.numel() * tensor.element_size() for tensor in layer.buffers())
    kept = "; the embedding that it was tied to stays as it is" if tied else ""
    return f"{name}: rounded to {scheme} for the product, {size / 1e6:.1f} MB, by {layer.backend}{kept}"
