"""What does not compose, and models that lack what a transform needs: refused before any work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from quantkit.errors import RecipeError, message
from quantkit.structure import Structure, find_heads, find_structure, misfit, structure_of_block
from quantkit.transforms.awq import AWQ
from quantkit.transforms.rotation import Rotation
from quantkit.transforms.smoothquant import SmoothQuant


def check_order(transforms: Sequence[SmoothQuant | AWQ | Rotation]) -> None:
    """Each at most once, and a rotation first: scales that were found before it would not fit the rotated channels.

    Raises:
        RecipeError: otherwise.
    """
    names = [transform.name for transform in transforms]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(message("transforms", f"{name} stands there {names.count(name)} times", "keep one"))
    if "rotation" in names[1:]:
        raise RecipeError(message("transforms", f"rotation stands behind {names[0]}", "put rotation first"))


def check_model(
    transforms: Sequence[SmoothQuant | AWQ | Rotation], model: nn.Module, block_path: str, blocks: Sequence[nn.Module]
) -> tuple[Structure, ...]:
    """The structure of each block that the transforms work on; none where there are no transforms.

    Args:
        transforms: of the recipe.
        model: a transformers model, on any device.
        block_path: module name of its list of decoder blocks.
        blocks: these blocks.

    Raises:
        RecipeError: the family, or this model, lacks what a transform needs.
    """
    if not transforms:
        return ()
    config: Any = model.config
    found = find_structure(config)
    names = ", ".join(transform.name for transform in transforms)
    if isinstance(found, str):
        raise RecipeError(message(f"transforms: {names}", found, "remove it from the recipe"))
    structures = tuple(structure_of_block(found, block) for block in blocks)
    for index, (structure, block) in enumerate(zip(structures, blocks, strict=True)):
        reason = misfit(structure, block, find_heads(config))
        if reason is not None:
            raise RecipeError(message(f"transforms: {names}", f"{block_path}.{index} {reason}", "remove it"))
    if any(isinstance(transform, Rotation) and transform.residual for transform in transforms):
        reason = _stream_misfit(structures, model, blocks)
        if reason is not None:
            where = "transforms: rotation of the residual stream"
            raise RecipeError(message(where, f"{config.model_type} models: {reason}", "use residual: false"))
    return structures


def _stream_misfit(structures: Sequence[Structure], model: nn.Module, blocks: Sequence[nn.Module]) -> str | None:
    """Why the residual stream cannot be rotated; None when it can."""
    stream = structures[0].residual
    if stream is None:
        return structures[0].refusal
    modules = dict(model.named_modules())
    final_gain = getattr(modules.get(stream.final_norm), "weight", None)
    if not isinstance(final_gain, Tensor):
        return f"there is no {stream.final_norm} with a gain"
    size = final_gain.numel()
    for name in stream.embeddings:
        weight = getattr(modules.get(name), "weight", None)
        if not isinstance(weight, Tensor) or weight.shape[-1] != size:
            return f"{name} is not an embedding of {size} channels"
    head = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Linear) or head.in_features != size:
        return f"the head is not a linear layer of {size} columns"
    for structure, block in zip(structures, blocks, strict=True):
        assert structure.residual is not None, "the blocks are of one family"
        inside = dict(block.named_modules())
        for name in (*(norm for norm, _ in structure.residual.norms), *structure.residual.writers):
            if name not in inside:
                return f"a block has no {name}"
    return None
