"""quantize(): from a model's name to a verified directory; the command line is a thin layer over it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.calibration import CalibrationSet, calibration_samples, from_tokens
from quantkit.card import CARD, card
from quantkit.checkpoint import CONFIG, Checkpoint, write_bytes, write_json
from quantkit.errors import CalibrationError, InterruptedRunError, QuantkitError, message
from quantkit.heap import map_large_blocks, trim
from quantkit.pipeline import Pipeline
from quantkit.plan import Plan
from quantkit.planning import check_disk, check_memory, make_plan
from quantkit.recipe import Recipe, load_recipe, make_recipe, merged
from quantkit.report import (
    LayerRecord,
    Note,
    Observer,
    Stage,
    Step,
    environment,
    ignore,
    layer_to_dict,
    totals,
    transform_to_dict,
    versions,
)
from quantkit.source import open_tokenizer, resolve_device, resolve_model
from quantkit.staging import Staging, check_output
from quantkit.verify import verify_output

RECIPE = "recipe.yaml"
REPORT = "report.json"
_DEFAULT_LENGTH = 2048


@dataclass(frozen=True, slots=True)
class Result:
    """A finished run.

    Attributes:
        path: the output directory.
        report: what ``report.json`` holds.
    """

    path: Path
    report: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked run: nothing was computed or written yet."""

    plan: Plan
    output: Path
    device: torch.device
    tokens: CalibrationSet | None
    num_tokens: int
    length: int

    @property
    def num_samples(self) -> int:
        """Calibration samples."""
        return len(self.tokens.samples) if self.tokens else self.plan.recipe.calibration.num_samples

    def to_dict(self) -> dict[str, Any]:
        """The plan's figures with those that depend on the calibration data."""
        return {
            **self.plan.to_dict(),
            "output": str(self.output),
            "device": str(self.device),
            "calibration_tokens": self.num_tokens,
            "training_passes_per_block": self.plan.training_passes(self.num_samples),
            "projected_peak_memory": self.plan.peak_memory(self.num_tokens, self.length),
        }


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    tokens: Iterable[Tensor | Sequence[int]] | None = None,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    observer: Observer = ignore,
) -> Result:
    """Quantize a causal language model in the Hugging Face layout into a directory.

    Args:
        model: ``builtin``, a local directory, or a hub id.
        output: the directory to write; it appears when everything is verified.
        recipe: a :class:`Recipe`, its plain values, the path of a YAML file, or None for the defaults.
        tokens: calibration samples of your own, integers [length] each; in place of the recipe's source.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        resume: continue an interrupted run with the same model and options.
        overwrite: replace what is at ``output``, at the end of the run; discard an interrupted run.
        observer: told of every step.

    Raises:
        InputError: the model, recipe, data or output directory cannot be used; nothing is left behind.
        HessianError: a layer's Hessian is not positive definite.
        InterruptedRunError: the machine stopped the run; finished blocks are kept for ``resume``.
    """
    prepared = prepare(model, output, recipe=recipe, tokens=tokens, device=device, resume=resume, overwrite=overwrite)
    return execute(prepared, resume=resume, observer=observer)


def prepare(
    model: str | Path,
    output: str | Path,
    *,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    tokens: Iterable[Tensor | Sequence[int]] | None = None,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
) -> Prepared:
    """All checks that need no calibration text and no weights; see :func:`quantize`."""
    values = recipe_values(recipe)
    target = Path(output).expanduser().absolute()
    check_output(target, overwrite=overwrite, resume=resume)
    placed = resolve_device(device)
    checkpoint = Checkpoint(resolve_model(model))
    plan = make_plan(checkpoint, make_recipe(with_length(values, checkpoint)))
    given = _own_tokens(tokens, plan) if tokens is not None else None
    spec = plan.recipe.calibration
    length = max(map(len, given.samples)) if given else spec.sequence_length
    num_tokens = given.num_tokens if given else spec.num_samples * spec.sequence_length
    check_length(plan, length)
    check_disk(plan, target, num_tokens)
    if placed.type == "cpu":
        check_memory(plan, num_tokens, length)
    return Prepared(plan, target, placed, given, num_tokens, length)


def execute(prepared: Prepared, *, resume: bool = False, observer: Observer = ignore) -> Result:
    """Carry a prepared run out; see :func:`quantize`."""
    started = time.time()
    map_large_blocks()
    plan = prepared.plan
    for note in plan.notes:
        observer(Note(note))
    data = prepared.tokens or (calibrate(plan, observer) if plan.runs_blocks else None)
    staging = Staging(prepared.output, plan.num_shards, _identity(prepared, data), resume=resume)
    before = staging.num_done()
    if resume:
        observer(
            Note(
                f"{before} of {plan.num_shards} shards are done"
                if before
                else "nothing to resume; starting from the beginning"
            )
        )
    try:
        samples = data.samples if data is not None else ()
        pipeline = Pipeline(plan, samples, staging, prepared.device, observer)
        records = pipeline.run()
        for note in fallback_notes(plan, records):
            observer(Note(note))
        report = _report(prepared, data, records, started, before)
        report["transforms"] = [transform_to_dict(record) for record in pipeline.transform_records]
        report["tuned"] = [asdict(record) for record in pipeline.tuned]
        _write_rest(plan, staging, report)
        observer(Stage("verifying", 1))
        verify_output(staging.path, plan, records, pipeline.tuned)
        observer(Step("verified"))
    except InterruptedRunError as error:
        raise InterruptedRunError(f"{error}; {_kept(staging)}") from error
    except KeyboardInterrupt:
        observer(Note(f"interrupted; {_kept(staging)}"))
        raise
    except QuantkitError:
        staging.discard()
        raise
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        raise InterruptedRunError(
            message(str(prepared.device), "out of memory", f"use a shorter --sequence-length; {_kept(staging)}")
        ) from error
    staging.publish()
    return Result(prepared.output, report)


def fallback_notes(plan: Plan, records: Sequence[LayerRecord]) -> list[str]:
    """What was not solved by the method that the recipe asks for, and why; the records name the layers."""
    planned = {layer.info.name: layer.solver.name for layer in plan.layers}
    rounded = [record for record in records if record.method != planned[record.name]]
    if not rounded:
        return []
    unseen = sum(record.num_tokens == 0 for record in rounded)
    return [
        f"{len(rounded)} of {len(records)} layers are rounded to nearest because too few calibration tokens reached "
        f"their experts ({unseen} saw none), such as {rounded[0].name}; use more calibration tokens, or see "
        "expert_tokens_per_column"
    ]


def recipe_values(recipe: Recipe | Mapping[str, Any] | str | Path | None) -> dict[str, Any]:
    """The keys that a recipe states, in any of the forms that :func:`quantize` takes."""
    if recipe is None:
        return {}
    if isinstance(recipe, Recipe):
        return recipe.to_dict()
    if isinstance(recipe, Mapping):
        make_recipe(recipe)
        return dict(recipe)
    return load_recipe(Path(recipe))


def with_length(values: dict[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """A recipe that does not state the sequence length gets 2048, or the model's limit where that is shorter."""
    calibration = values.get("calibration")
    if isinstance(calibration, Mapping) and "sequence_length" in calibration:
        return values
    limit = checkpoint.config.get("max_position_embeddings") or checkpoint.config.get("n_positions")
    length = min(_DEFAULT_LENGTH, limit) if isinstance(limit, int) and limit > 1 else _DEFAULT_LENGTH
    return merged(values, {"calibration": {"sequence_length": length}})


def check_length(plan: Plan, length: int) -> None:
    """The model has a position for every token of a sample.

    Raises:
        CalibrationError: it has not.
    """
    limit = getattr(plan.skeleton.model.config, "max_position_embeddings", None)
    if plan.runs_blocks and isinstance(limit, int) and length > limit:
        raise CalibrationError(
            message("--sequence-length", f"{length} is more than the model's {limit} positions", f"use at most {limit}")
        )


def _own_tokens(tokens: Iterable[Tensor | Sequence[int]], plan: Plan) -> CalibrationSet:
    bos = plan.skeleton.model.config.bos_token_id
    return from_tokens(tokens, vocab_size=_vocab_size(plan), bos_token_id=bos if isinstance(bos, int) else None)


def _vocab_size(plan: Plan) -> int:
    embedding = plan.skeleton.model.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    return int(embedding.shape[0])


def calibrate(plan: Plan, observer: Observer) -> CalibrationSet:
    """Draw the samples that a plan's recipe asks for; see :func:`quantkit.calibration.calibration_samples`."""
    spec = plan.recipe.calibration
    observer(Note(f"calibration: {spec.num_samples} x {spec.sequence_length} tokens of {spec.source}"))
    data = calibration_samples(spec, open_tokenizer(plan.checkpoint.path), vocab_size=_vocab_size(plan))
    trim()  # of the text, its tokens and the tokenizer nothing but the samples is left
    for note in data.notes:
        observer(Note(note))
    return data


def _identity(prepared: Prepared, data: CalibrationSet | None) -> dict[str, Any]:
    return {
        "model": prepared.plan.checkpoint.fingerprint(),
        "recipe": prepared.plan.recipe.to_dict(),
        "calibration": data.sha256 if data else None,
        "device": prepared.device.type,
        "threads": torch.get_num_threads() if prepared.device.type == "cpu" else None,
        "versions": versions(),
    }


def _report(
    prepared: Prepared, data: CalibrationSet | None, records: Sequence[LayerRecord], started: float, before: int
) -> dict[str, Any]:
    calibration = None
    if data is not None:
        calibration = {
            "source": data.source,
            "num_samples": len(data.samples),
            "num_tokens": data.num_tokens,
            "sha256": data.sha256,
            "seed": prepared.plan.recipe.calibration.seed if prepared.tokens is None else None,
            "notes": list(data.notes),
        }
    return {
        **prepared.to_dict(),
        "calibration": calibration,
        "recipe": prepared.plan.recipe.to_dict(),
        "model_fingerprint": prepared.plan.checkpoint.fingerprint(),
        "seconds": time.time() - started,
        "shards_found_done": before,
        "totals": totals(records),
        "layers": [layer_to_dict(record) for record in records],
        "skipped": [{"name": name, "reason": reason} for name, reason in prepared.plan.skipped],
        "notes": [*prepared.plan.notes, *fallback_notes(prepared.plan, records)],
        "environment": environment(prepared.device),
    }


def _write_rest(plan: Plan, staging: Staging, report: dict[str, Any]) -> None:
    """Everything besides the shards: index, config, recipe, report, and the source's small files as they are."""
    path = staging.path
    config = {**plan.config, "quantization_config": plan.quantization}
    staging.write_rest(plan.checkpoint.other_files(), {CONFIG: config, **plan.format.config_files(plan.quantization)})
    command = f"quantkit quantize {plan.checkpoint.path} --recipe {RECIPE} --output DIR"
    heading = f"The complete recipe of this checkpoint; to make it again:\n{command}"
    recipe = plan.recipe.to_yaml(heading)
    write_bytes(path / RECIPE, recipe.encode())
    text = card(report, recipe, plan.quantization, plan.checkpoint.path)
    write_bytes(path / CARD, text.encode())
    write_json(path / REPORT, report)


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether torch found no memory: a class of its own on a GPU, words on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _kept(staging: Staging) -> str:
    """What is left of an interrupted run; nothing when no block was finished."""
    done = staging.num_done()
    if done == 0:
        staging.discard()
        return "nothing was kept"
    return f"{done} of {staging.num_shards} shards are kept in {staging.path}: run again with --resume"
