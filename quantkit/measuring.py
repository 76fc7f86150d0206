"""A block is measured: the statistics that its solvers and transforms read, in as few passes as they allow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from quantkit.capture import Measurement
from quantkit.experts import SplitExperts
from quantkit.layer_plan import LayerPlan
from quantkit.routing import ExpertInputs, expert_groups
from quantkit.stats import LayerStats, Stat
from quantkit.streams import Runner, Streams
from quantkit.transforming import Samples, Transforming
from quantkit.transforms import TransformRecord


@dataclass(frozen=True, slots=True)
class Scaled:
    """A block whose channels were scaled.

    Attributes:
        records: what was done.
        original: the block's parameters before, where the full-precision model runs too.
        measured: what the solvers need too, in the new scale; None: they measure in passes of their own.
    """

    records: list[TransformRecord]
    original: dict[str, nn.Parameter]
    measured: Measurement | None


class Measuring:
    """What blocks are measured for.

    Args:
        runner: runs them.
        transforming: finds and folds scales.
    """

    def __init__(self, runner: Runner, transforming: Transforming) -> None:
        self.plan, self.skeleton = runner.plan, runner.skeleton
        self._runner, self._transforming = runner, transforming

    def scale(
        self, index: int, layers: Sequence[LayerPlan], source: dict[str, Tensor], streams: Streams | None
    ) -> Scaled | None:
        """Measure the block as it was read, and find and fold the scales of its channels; None: no such transform."""
        if not self.plan.scale_transforms or streams is None:
            return None
        original = self._original(index, streams)
        apart = self.plan.measures_apart(index)  # solvers measure later, in passes of their own
        measuring = [] if apart else [layer for layer in layers if layer.needs]
        names = dict.fromkeys((*(layer.info.local for layer in measuring), *self._transforming.readers(index)))
        needs, everything = self.plan.transform_needs | _needs(measuring), range(len(streams.hidden))
        measured = self._measure(index, list(names), needs, streams, original, everything, advance=not apart)
        lengths = tuple(int(streams.hidden[one].shape[1]) for one in everything)
        samples = Samples(lengths, lambda one: self._runner.run(index, streams.hidden[one]))
        records = self._transforming.scale_block(index, source, measured, samples)
        return Scaled(records, original, None if apart else measured)

    def groups(
        self, index: int, layers: Sequence[LayerPlan], streams: Streams | None, scaled: Scaled | None
    ) -> Iterator[tuple[list[LayerPlan], LayerStats | None]]:
        """The layers to solve together, one group after the other, each with the statistics of its input.

        Everything is measured in one pass; or, true-sequentially, each group in a pass of its own when the groups
        before it are quantized already. What was measured to find scales is measured already. Experts come last: their
        inputs are kept in the last pass, and no pass follows, so that their weights are replaced in place.
        """
        if scaled is not None and scaled.measured is not None:
            yield from _groups(layers, scaled.measured)
            return
        sequential = self.plan.recipe.true_sequential
        original = self._original(index, streams)
        ordinary = [layer for layer in layers if layer.info.expert is None]
        measuring = [layer for layer in ordinary if layer.needs]
        parts = [measuring] if measuring else []
        if streams is not None and sequential and measuring:
            by_name = {layer.info.local: layer for layer in measuring}
            probe = self._measure(index, list(by_name), _needs(measuring), streams, original, range(1))
            parts = [[by_name[name] for name in names] for names in probe.groups()]
        yield from _groups([layer for layer in ordinary if not layer.needs], None)
        with self._expert_inputs(layers, streams) as routed:
            if routed and (sequential or not parts):
                parts.append([])
            for part in parts:
                assert streams is not None, "the caller enters the model whenever a solver measures"
                last = part is parts[-1]
                names, samples = [layer.info.local for layer in part], range(len(streams.hidden))
                measured = self._measure(
                    index,
                    names,
                    _needs(part),
                    streams,
                    original,
                    samples,
                    experts=list(routed.values()) if last else (),
                    advance=last and scaled is None,
                )
                yield from _groups(part, measured)
            if streams is not None and streams.reference is not None and (scaled is not None or not parts):
                # With the weights as they were read, which a resumed run has too.
                with _holding(self.skeleton.blocks[index], original if scaled is None else scaled.original):
                    self._runner.hand_on(index, streams.reference, to_compare=self.plan.tunes)
            for name, members in _by_experts(layers).items():
                threshold = self.plan.recipe.expert_tokens_per_column
                yield from expert_groups(members, routed.get(name), threshold, sequential)

    def _original(self, index: int, streams: Streams | None) -> dict[str, nn.Parameter]:
        """The block's parameters as they are now, where the full-precision model runs too; else nothing holds them."""
        compared = streams is not None and streams.reference is not None
        return _weights(self.skeleton.blocks[index]) if compared else {}

    @contextmanager
    def _expert_inputs(self, layers: Sequence[LayerPlan], streams: Streams | None) -> Iterator[dict[str, ExpertInputs]]:
        """For each module of experts in which something is measured, where its inputs are kept while it is solved."""
        modules = {
            name: cast(SplitExperts, self.skeleton.model.get_submodule(name))
            for name, members in _by_experts(layers).items()
            if any(layer.solver.needs for layer in members)
        }
        lengths = [len(sample) for sample in self._runner.samples]
        budget = self.plan.experts_budget(sum(lengths)) // max(len(modules), 1)
        infos = {info.name: info for info in self.skeleton.experts}
        compared = streams is not None and streams.reference is not None
        inputs: dict[str, ExpertInputs] = {}
        try:
            for name, module in modules.items():
                inputs[name] = ExpertInputs(
                    infos[name], module, lengths, self.plan.dtype, budget, self._runner.directory, compared
                )
            yield inputs
        finally:
            for kept in inputs.values():
                kept.close()

    def _measure(
        self,
        index: int,
        names: Sequence[str],
        needs: frozenset[Stat],
        streams: Streams,
        original: dict[str, nn.Parameter],
        samples: range,
        *,
        experts: Sequence[ExpertInputs] = (),
        advance: bool = False,
    ) -> Measurement:
        """Statistics of the layers' inputs, which come from quantized blocks.

        Args:
            index: the block.
            names: linear layers, within the block.
            needs: what to gather.
            streams: the hidden states in front of the block.
            original: the block's weights in full precision.
            samples: which to run.
            experts: whose inputs are kept in this pass.
            advance: leave the reference stream behind the block.
        """
        block = self.skeleton.blocks[index]
        measurement = Measurement({name: block.get_submodule(name) for name in names}, needs)
        measuring: list[Measurement | ExpertInputs] = [measurement, *experts]
        compared = advance or bool(experts) or Stat.DRIFT in needs
        with ExitStack() as hooks:
            for each in measuring:
                hooks.enter_context(each.hooked())
            for sample in samples:
                if streams.reference is not None and compared:
                    with ExitStack() as exactly, _holding(block, original):
                        for each in experts:
                            exactly.enter_context(each.of_reference())
                        exactly.enter_context(measurement.of_reference(whole=advance or bool(experts)))
                        exact = self._runner.run(index, streams.reference[sample])
                    if advance:
                        streams.reference[sample] = exact
                with measurement.one_pass(whole=bool(experts)):  # experts come after the last layer
                    self._runner.run(index, streams.hidden[sample])
        return measurement


def _groups(
    layers: Sequence[LayerPlan], measured: Measurement | None
) -> Iterator[tuple[list[LayerPlan], LayerStats | None]]:
    """Layers to solve together: same input, scheme and solver; with the statistics of their input."""
    by_name = {layer.info.local: layer for layer in layers}
    shared = [[name for name in names if name in by_name] for names in measured.groups()] if measured else []
    shared += [[name] for name in by_name if not any(name in names for names in shared)]
    for names in shared:
        stats = measured.inputs.get(names[0]) if measured and names else None
        alike: dict[object, list[LayerPlan]] = {}
        for name in names:
            alike.setdefault((by_name[name].scheme, by_name[name].solver), []).append(by_name[name])
        yield from ((group, stats) for group in alike.values())


def _by_experts(layers: Sequence[LayerPlan]) -> dict[str, list[LayerPlan]]:
    """The layers of stacked experts, by module."""
    found: dict[str, list[LayerPlan]] = {}
    for layer in layers:
        if layer.info.expert is not None:
            found.setdefault(layer.info.expert.module, []).append(layer)
    return found


def _needs(layers: Sequence[LayerPlan]) -> frozenset[Stat]:
    return frozenset[Stat]().union(*(layer.needs for layer in layers))


def _weights(block: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a block holds now, by name."""
    return dict(block.named_parameters())


@contextmanager
def _holding(block: nn.Module, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """The block has these parameters inside, and those that it had before again afterwards."""
    before = _weights(block)
    _put(block, parameters)
    try:
        yield
    finally:
        _put(block, before)


def _put(block: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        owner, _, leaf = name.rpartition(".")
        block.get_submodule(owner)._parameters[leaf] = parameter
