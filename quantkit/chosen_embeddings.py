"""Which embeddings a recipe quantizes, and how: only those that a rule of its own names, and never by a measurement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from quantkit.embedding import why_not_embedding
from quantkit.errors import RecipeError, message
from quantkit.layer_plan import LayerPlan
from quantkit.recipe import Recipe, Rule
from quantkit.skeleton import Skeleton, embedding_modules
from quantkit.solvers import RTN


def with_embeddings(
    skeleton: Skeleton, recipe: Recipe, layers: Sequence[LayerPlan], *, rotated: bool
) -> tuple[LayerPlan, ...]:
    """The planned linear layers, and the embeddings behind them.

    A tied head that has the scheme of its embedding, and is rounded as that is, has its codes (``LayerPlan.shares``).

    Args:
        skeleton: the model.
        recipe: what to do with it.
        layers: its planned linear layers.
        rotated: whether a transform gives a tied head a matrix of its own.

    Raises:
        RecipeError: a rule that asks of an embedding what is not possible.
    """
    embeddings = tuple(_chosen(skeleton, recipe))
    if rotated:
        return (*layers, *embeddings)
    by_name = {layer.info.name: layer for layer in embeddings}
    owners = {head: by_name.get(source) for head, source in _ties(skeleton).items()}
    found = []
    for layer in layers:
        owner = owners.get(layer.info.name)
        shares = owner is not None and (layer.scheme, layer.solver) == (owner.scheme, owner.solver)
        found.append(replace(layer, shares=owner.info.name) if owner is not None and shares else layer)
    planned = {layer.info.name for layer in layers}
    for head, owner in owners.items():
        if owner is not None and head not in planned:
            _refuse_dense_head(head, owner)
    return (*found, *embeddings)


def unmeant(skeleton: Skeleton, recipe: Recipe) -> Iterator[str]:
    """Notes on embeddings that a rule matches and does not mean, because it matches linear layers too."""
    names = embedding_modules(skeleton)
    meant = _naming(skeleton, recipe)
    for rule in recipe.rules:
        matched = [name for name in names if rule.matches(name)]
        if matched and not rule.skip and rule not in meant:
            yield (
                f"match: {rule.match!r} means linear layers, and leaves {', '.join(matched)} as it is: an embedding is "
                "quantized by a rule that matches no linear layer, such as one with its whole name"
            )


def named_embeddings(skeleton: Skeleton, rule: Rule) -> list[str]:
    """The embeddings that a rule means, whether or not they can be quantized."""
    means_linears = any(rule.matches(info.name) for info in skeleton.linears)
    return [] if means_linears else [name for name in embedding_modules(skeleton) if rule.matches(name)]


def _chosen(skeleton: Skeleton, recipe: Recipe) -> Iterator[LayerPlan]:
    """The embeddings for which the first rule that means them asks for more than to leave them."""
    infos = {info.name: info for info in skeleton.embeddings}
    naming = _naming(skeleton, recipe)
    for name, module in embedding_modules(skeleton).items():
        rule = next((rule for rule in naming if rule.matches(name)), None)
        if rule is None or rule.skip:
            continue
        reason = why_not_embedding(module)
        if reason is not None:
            raise RecipeError(message(name, f"cannot be quantized: {reason}", "remove the rule that names it"))
        scheme, solver = rule.scheme or recipe.scheme, rule.method or recipe.method
        if scheme.act_bits is not None:
            what = f"scheme {scheme} rounds activations, and an embedding has none"
            raise RecipeError(message(name, what, "use a weight-only scheme, such as w8a16_g64"))
        if not isinstance(solver, RTN):
            what = f"method {solver.name} measures a layer's inputs, and an embedding's are token ids"
            raise RecipeError(message(name, what, "add method: rtn to the rule that quantizes it"))
        yield LayerPlan(infos[name], scheme, solver)


def _naming(skeleton: Skeleton, recipe: Recipe) -> list[Rule]:
    return [rule for rule in recipe.rules if named_embeddings(skeleton, rule)]


def _ties(skeleton: Skeleton) -> dict[str, str]:
    """Module name of a tied head -> that of its embedding."""
    tied = skeleton.model.all_tied_weights_keys
    named = {info.name for info in skeleton.linears if info.tied}
    return {name: tied[f"{name}.weight"].removesuffix(".weight") for name in named}


def _refuse_dense_head(head: str, owner: LayerPlan) -> None:
    """A head that stays dense would need the dense matrix beside the codes: the file would grow.

    Raises:
        RecipeError: always.
    """
    raise RecipeError(
        message(
            owner.info.name,
            f"{head} is tied to it: were it left dense, the file would hold the dense matrix and the codes",
            f"add the rule {{match: {head}, scheme: {owner.scheme}, method: rtn}}, and one set of codes is for both",
        )
    )
