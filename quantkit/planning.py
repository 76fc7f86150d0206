"""A recipe is checked against a model, from the config and the headers alone, and becomes a plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import psutil
import torch

from quantkit.arch import collapsed_name, unequal_fused
from quantkit.checkpoint import Checkpoint
from quantkit.chosen_embeddings import named_embeddings, unmeant, with_embeddings
from quantkit.errors import CheckpointError, OutputError, RecipeError, SchemeError, message
from quantkit.formats import CheckpointFormat, format_named
from quantkit.layer_plan import LayerPlan, encoded_bytes
from quantkit.loaders import Rule, broken, newest_targets, places, rules_for
from quantkit.model_facts import model_facts
from quantkit.plan import Plan
from quantkit.recipe import Recipe
from quantkit.scheme import QuantScheme
from quantkit.skeleton import LinearInfo, Skeleton, check_complete, open_skeleton
from quantkit.solvers import GPTQ, RTN, AutoRound, Solver
from quantkit.source import resolve_dtype
from quantkit.transforms import AWQ, Rotation, check_model

_LEFT_OUT_SHOWN = 5
_MIB = 2**20
_ROUTER = "routers stay as they are"
_DISK_MARGIN = 16 * _MIB  # config, tokenizer, report


def make_plan(checkpoint: Checkpoint, recipe: Recipe) -> Plan:
    """Check a recipe against a model and lay out the run.

    Raises:
        CheckpointError: an already quantized model, not a causal language model, or tensors that do not fit.
        RecipeError: rules that match nothing, or that leave nothing to quantize, or ask for what is not possible.
        SchemeError: group sizes that do not divide, with every offending layer and the legal sizes.
    """
    quantization = checkpoint.quantization
    if quantization is not None:
        kind = quantization.get("quant_method", "unknown")
        raise CheckpointError(
            message(str(checkpoint.path), f"is already quantized ({kind})", "give the original full-precision model")
        )
    dtype = resolve_dtype(recipe.dtype, checkpoint.float_dtype)
    skeleton = open_skeleton(checkpoint, dtype)
    checkpoint = skeleton.checkpoint
    check_complete(skeleton, checkpoint)
    layers, skipped = _choose(skeleton, recipe)
    rotated = any(isinstance(one, Rotation) and one.residual for one in recipe.transforms)
    layers = with_embeddings(skeleton, recipe, layers, rotated=rotated)
    _check_rules(skeleton, recipe)
    _check_shapes(checkpoint, layers)
    fmt = format_named(recipe.format)
    _check_format(fmt, layers)
    if not layers:
        raise RecipeError(message("rules", "nothing is left to quantize", "remove a skip rule"))
    _check_drift(recipe, layers)
    _check_clip(recipe, layers)
    structures = check_model(recipe.transforms, skeleton.model, skeleton.block_path, skeleton.blocks)
    notes = (*_notes(skeleton, fmt, dtype, layers), *unmeant(skeleton, recipe))
    plan = Plan(checkpoint, skeleton, recipe, fmt, dtype, layers, skipped, notes, structures)
    _check_config(plan)
    _check_share(plan)
    _check_tunings(plan)
    return replace(plan, notes=(*notes, *_transform_notes(plan)))


def _check_tunings(plan: Plan) -> None:
    """The layers of a block are learned together: they share one set of options."""
    for layer in plan.layers:
        if plan.tunes and layer.scheme.act_bits is not None:
            raise RecipeError(
                message(
                    layer.info.name,
                    f"scheme {layer.scheme} rounds activations, which no gradient passes: its block cannot be learned",
                    "use a weight-only scheme, or method rtn or gptq without tuning",
                )
            )
    for index in range(len(plan.skeleton.blocks)):
        options = {layer.solver for layer in plan.block_layers(index) if isinstance(layer.solver, AutoRound)}
        if len(options) > 1:
            raise RecipeError(
                message(
                    f"{plan.skeleton.block_path}.{index}",
                    "its layers have autoround with different options, and are learned together",
                    "give them the same options; their schemes may differ",
                )
            )


def _check_clip(recipe: Recipe, layers: tuple[LayerPlan, ...]) -> None:
    """Clipped ranges are those of round-to-nearest; a solver that chooses ranges itself would undo and suffer them."""
    if not any(isinstance(one, AWQ) and one.clip for one in recipe.transforms):
        return
    for layer in layers:
        if layer.info.expert is not None:
            raise RecipeError(
                message(
                    "transforms: awq",
                    f"clip: true needs the Hessians of all layers of a block at once, and {layer.info.name} is one of "
                    "many experts, which are measured one at a time",
                    "use clip: false",
                )
            )
        if layer.info.block is not None and layer.solver.name != RTN.name:
            raise RecipeError(
                message(
                    "transforms: awq",
                    f"clip: true is for method rtn, and {layer.info.name} has method {layer.solver.name}, which "
                    "chooses ranges of its own",
                    "use clip: false",
                )
            )


def check_disk(plan: Plan, output: Path, num_tokens: int) -> None:
    """The disk that holds ``output`` has room for the checkpoint and for activations over their budget.

    Raises:
        OutputError: it has not.
    """
    needed = plan.size_after + _DISK_MARGIN + plan.mapped_bytes(num_tokens)
    place = next(p for p in (output, *output.parents) if p.exists())
    free = psutil.disk_usage(str(place)).free
    if free < needed:
        raise OutputError(
            message(
                str(output),
                f"needs {needed / _MIB:.0f} MiB and the disk has {free / _MIB:.0f} MiB free",
                "free space or choose another --output",
            )
        )


def check_memory(plan: Plan, num_tokens: int, sequence_length: int) -> None:
    """The machine has the projected peak memory available.

    Raises:
        OutputError: it has not.
    """
    needed, available = plan.peak_memory(num_tokens, sequence_length), psutil.virtual_memory().available
    if needed > available:
        raise OutputError(
            message(
                "memory",
                f"the run needs about {needed / _MIB:.0f} MiB and {available / _MIB:.0f} MiB are available",
                "lower --activation-memory or --sequence-length, or use --method rtn",
            )
        )


def _choose(skeleton: Skeleton, recipe: Recipe) -> tuple[tuple[LayerPlan, ...], tuple[tuple[str, str], ...]]:
    layers: list[LayerPlan] = []
    skipped: list[tuple[str, str]] = []
    head = skeleton.head_name()
    for info in skeleton.linears:
        choice = recipe.choice(info.name, info.block is not None and not info.router)
        if choice is None:
            skipped.append((info.name, _why_skipped(info, recipe)))
            continue
        if info.block is None:
            _check_outside(info, *choice, is_head=info.name == head)
        if info.expert is not None and choice[0].act_static:
            raise RecipeError(
                message(
                    info.name,
                    f"{choice[0]}: an expert may see too few tokens for one range, and no engine runs such experts",
                    f'add the rule {{match: "{info.expert.module}.*", scheme: w8a8}} for dynamic activations',
                )
            )
        layers.append(LayerPlan(info, *choice))
    named = {info.name for info in skeleton.linears}
    skipped += [(name, _ROUTER) for name in skeleton.routers if name not in named]
    skipped += [(name, _kept_whole(name, reason, recipe)) for name, reason in skeleton.opaque_experts]
    return tuple(layers), tuple(skipped)


def _check_outside(info: LinearInfo, scheme: QuantScheme, solver: Solver, is_head: bool) -> None:
    """Outside of the blocks only the output head's input is measured, and nothing is tuned."""
    if isinstance(solver, AutoRound):
        raise RecipeError(
            message(
                info.name,
                "method autoround looks at a decoder block's output, and learns layers inside of the blocks only",
                "give the rule that quantizes it a method of its own: rtn or gptq",
            )
        )
    if solver.needs and not is_head:
        raise RecipeError(
            message(
                info.name,
                f"method {solver.name} measures the layers inside of the blocks and the output head only",
                "add method: rtn to the rule that quantizes it",
            )
        )
    if scheme.act_static and not is_head:
        raise RecipeError(
            message(
                info.name,
                f"the static activations of {scheme} are measured inside of the blocks and at the output head only",
                "give the rule that quantizes it dynamic activations, such as w8a8",
            )
        )


def _why_skipped(info: LinearInfo, recipe: Recipe) -> str:
    if any(rule.matches(info.name) for rule in recipe.rules):
        return "kept by a rule"
    return _ROUTER if info.router else "outside of the blocks"


def _kept_whole(name: str, reason: str, recipe: Recipe) -> str:
    """Experts that cannot be quantized are most of a model: they stay as they are only when a rule says so.

    Raises:
        RecipeError: none does.
    """
    rule = next((rule for rule in recipe.rules if rule.matches(name)), None)
    if rule is None or not rule.skip:
        raise RecipeError(
            message(name, reason, f'add the rule {{match: "{collapsed_name(name)}", skip: true}} to keep such experts')
        )
    return "kept by a rule"


def _check_rules(skeleton: Skeleton, recipe: Recipe) -> None:
    names = [info.name for info in skeleton.linears]
    others = [*skeleton.routers, *(name for name, _ in skeleton.opaque_experts)]
    for rule in recipe.rules:
        found = any(rule.matches(name) for name in (names + others if rule.skip else names))
        if not found and not named_embeddings(skeleton, rule):
            raise RecipeError(
                message(
                    "rules",
                    f"match: {rule.match!r} matches no linear layer of this model, and no embedding",
                    f"names look like {names[0]} or {names[-1]}",
                )
            )


def _check_shapes(checkpoint: Checkpoint, layers: tuple[LayerPlan, ...]) -> None:
    wrong: dict[str, list[str]] = {}
    for layer in layers:
        name = f"{layer.info.stem}.weight"
        dtype = checkpoint.tensors[name].dtype if name in checkpoint.tensors else checkpoint.float_dtype
        if not dtype.is_floating_point:
            raise CheckpointError(
                message(f"{layer.info.stem}.weight", f"is {dtype}", "quantkit quantizes floating-point weights")
            )
        reason = layer.scheme.why_not(layer.info.in_features)
        if reason is not None:
            wrong.setdefault(reason, []).append(layer.info.name)
    if wrong:
        raise SchemeError(" | ".join(f"{places(names, len(names))}: {reason}" for reason, names in wrong.items()))


def _check_format(fmt: CheckpointFormat, layers: tuple[LayerPlan, ...]) -> None:
    for layer in layers:
        if layer.info.embedding and not fmt.holds_embeddings:
            what = f"format {fmt.name} holds linear layers only, and this is an embedding"
            raise RecipeError(message(layer.info.name, what, "use format compressed-tensors, or remove its rule"))
        reason = fmt.why_not(layer.scheme, (layer.info.out_features, layer.info.in_features))
        if reason is not None:
            raise SchemeError(message(layer.info.name, f"format {fmt.name} cannot hold {layer.scheme}", reason))
        if layer.solver.writes_g_idx and not fmt.holds_g_idx:
            raise RecipeError(
                message(
                    layer.info.name,
                    f"format {fmt.name} does not hold the reordered groups of act_order: group",
                    "use act_order: static, which needs none, or format gptq",
                )
            )


def _check_config(plan: Plan) -> None:
    """Schemes that cannot stand in one config are refused before any work."""
    _ = plan.quantization


def _check_drift(recipe: Recipe, layers: tuple[LayerPlan, ...]) -> None:
    """The drift must be what is left when the layers in front are corrected already.

    Measured in one pass for the whole block, that of o_proj and down_proj still holds what q/k/v's and gate/up's own
    corrections take away, and it would be corrected twice.
    """
    if recipe.true_sequential:
        return
    for layer in layers:
        if layer.info.block is not None and isinstance(layer.solver, GPTQ) and layer.solver.drift_correction > 0:
            raise RecipeError(
                message(
                    layer.info.name,
                    "drift_correction in one pass for the block would correct the same error more than once",
                    "set true_sequential: true, or drift_correction: 0",
                )
            )


def _check_share(plan: Plan) -> None:
    """The recipe's expectation of how much is quantized, held before any work."""
    share, wanted = plan.num_quantized / plan.num_parameters, plan.recipe.min_share
    if share >= wanted:
        return
    shown = [f"{name} ({numel / plan.num_parameters:.1%})" for name, numel in plan.left_out[:_LEFT_OUT_SHOWN]]
    more = len(plan.left_out) - len(shown)
    rest = f" and {more} more ({sum(n for _, n in plan.left_out[_LEFT_OUT_SHOWN:]) / plan.num_parameters:.1%})"
    raise RecipeError(
        message(
            "min_share",
            f"{share:.1%} of the parameters would be quantized and the recipe expects {wanted:.1%}; left out: "
            f"{', '.join(shown)}{rest if more else ''}",
            "quantize more of them by a rule, or lower min_share",
        )
    )


def _notes(
    skeleton: Skeleton, fmt: CheckpointFormat, dtype: torch.dtype, layers: tuple[LayerPlan, ...]
) -> tuple[str, ...]:
    """What this plan's output will not do in other programs."""
    schemes: dict[str, object] = {info.name: None for info in skeleton.linears if info.expert is None}
    of_linears = [layer for layer in layers if layer.info.expert is None and not layer.info.embedding]
    schemes.update({layer.info.name: layer.scheme for layer in of_linears})
    notes = [f"{group} share one matrix in vLLM and must have one scheme there" for group in unequal_fused(schemes)]
    notes += _loader_notes(skeleton, fmt, dtype, layers)
    embedded = any(layer.info.embedding for layer in layers)
    for layer in layers:
        size = f"{encoded_bytes(fmt, layer, dtype) / 1e6:.1f} MB"
        if layer.shares is not None:
            notes.append(f"{layer.info.name} stays tied to {layer.shares}: one set of codes, {size}, is for both")
        elif layer.info.tied and embedded:
            notes.append(
                f"{layer.info.name} shares its weight with the embedding, and has another scheme or method: it is "
                f"untied (config.json: tie_word_embeddings false), and its own codes add {size}"
            )
        elif layer.info.tied:
            notes.append(
                f"{layer.info.name} shares its weight with the embedding: it is untied (config.json: "
                f"tie_word_embeddings false), the embedding stays as it is, and the quantized copy adds {size}"
            )
    return tuple(notes)


def _transform_notes(plan: Plan) -> list[str]:
    """What the transforms change besides the quantized layers."""
    if plan.untied is None:
        return []
    cost = f"{plan.added_bytes / 1e6:.1f} MB more" if plan.added_bytes else "no more bytes, for it has one on disk"
    return [f"rotating the residual stream gives the head, tied to the embedding, a matrix of its own: {cost}"]


def _loader_notes(
    skeleton: Skeleton, fmt: CheckpointFormat, dtype: torch.dtype, layers: tuple[LayerPlan, ...]
) -> list[str]:
    """What other programs would refuse or misread, or could not read until lately, by the table of loaders.json."""
    schemes = {layer.info.name: layer.scheme for layer in layers}
    tied = frozenset(layer.shares for layer in layers if layer.shares is not None)
    facts = list(model_facts(skeleton, fmt.name, schemes, dtype, tied=tied))
    reordered = {layer.info.name for layer in layers if layer.solver.writes_g_idx}
    facts = [replace(one, desc_act=True, reordered=True) if one.name in reordered else one for one in facts]
    found: dict[str, tuple[Rule, list[str], list[str]]] = {}
    for target in newest_targets():
        for rule, names in broken(rules_for(target), facts):
            # The fused are named above, with their schemes.
            if rule.id != "fused" and (rule.harm != "note" or rule.about_head):
                found.setdefault(rule.id, (rule, names, []))[2].append(str(target))
    return [f"{', '.join(programs)}: {rule.what}: {places(names)}" for rule, names, programs in found.values()]
