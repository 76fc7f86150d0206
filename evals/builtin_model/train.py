"""Trains the small Llama model that quantkit ships as package data, and writes its model card.

    python evals/builtin_model/train.py [--output quantkit/builtin] [--steps N]

One command, on the CPU, from a fixed seed. The tokenizer and the model see the calibration split of the
built-in text; losses are measured on the evaluation split. The best checkpoint so far always stands in the
output, so an interrupted run leaves a model that works; the card and results.json are written at the end, of
the weights that were saved. Two runs agree to the bit on the same machine and Python, and closely elsewhere.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from card import model_card
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quantkit.builtin_text import builtin_documents

HERE = Path(__file__).resolve().parent
BOS, EOS = "<s>", "</s>"
CONTEXT = 2048


@dataclass(frozen=True)
class Stage:
    """A stretch of training at one window length."""

    share: float  # of the steps
    batch_size: int
    window: int  # tokens


@dataclass(frozen=True)
class Plan:
    """What the training does; every number of it is in the card."""

    steps: int = 2000
    seed: int = 0
    vocab_size: int = 2048
    # Short windows are cheaper; the later stages teach the positions up to the full context.
    stages: tuple[Stage, ...] = (Stage(0.5, 8, 256), Stage(0.35, 4, 512), Stage(0.15, 1, CONTEXT))
    learning_rate: float = 3e-3
    final_learning_rate: float = 3e-5
    warmup_steps: int = 150
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    evaluate_every: int = 250
    threads: int = 1


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts one BOS in front; digits stay single, any byte can be written."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B:1",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All documents after one another, each BOS ... EOS: int64 [tokens]."""
    encoded = tokenizer.backend_tokenizer.encode_batch(texts)
    return torch.tensor([token for text in encoded for token in (*text.ids, tokenizer.eos_token_id)])


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """The untrained model, in float32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        # Deep and narrow, so that rounding shows: 2 bits (RTN, groups of 128) raise the perplexity by 63 % here, and
        # raised that of 4 blocks of width 256 and intermediate 768, trained alike, by 20 %.
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return model


def batches(stream: Tensor, plan: Plan) -> Iterator[Tensor]:
    """One int64 [batch, window] a step, at random places of the stream, which begins with BOS.

    Half of the windows have that BOS in place of their first token, so that the model is at home both in
    windows cut from the middle of a text and in windows that a tokenizer put a BOS in front of.
    """
    generator = torch.Generator().manual_seed(plan.seed)
    for stage, steps in zip(plan.stages, stage_steps(plan), strict=True):
        for _ in range(steps):
            starts = torch.randint(len(stream) - stage.window, (stage.batch_size, 1), generator=generator)
            batch = stream[starts + torch.arange(stage.window)]
            batch[torch.rand(stage.batch_size, generator=generator) < 0.5, 0] = stream[0]
            yield batch


def stage_steps(plan: Plan) -> list[int]:
    """How many steps each stage gets."""
    ends = [round(plan.steps * sum(s.share for s in plan.stages[: i + 1])) for i in range(len(plan.stages))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def learning_rate(step: int, plan: Plan) -> float:
    """Linear warm-up, then a cosine down to the final rate."""
    if step < plan.warmup_steps:
        return plan.learning_rate * (step + 1) / plan.warmup_steps
    progress = (step - plan.warmup_steps) / max(1, plan.steps - plan.warmup_steps)
    fall = (1 + math.cos(math.pi * progress)) / 2
    return plan.final_learning_rate + (plan.learning_rate - plan.final_learning_rate) * fall


def optimizer_for(model: LlamaForCausalLM, plan: Plan) -> torch.optim.AdamW:
    """AdamW; norms are not decayed."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=plan.betas, fused=True)


@torch.inference_mode()
def mean_loss(model: LlamaForCausalLM, stream: Tensor, window: int = 512) -> float:
    """Mean cross-entropy in nats over windows that do not overlap; the first token of each is not scored."""
    windows = stream[: len(stream) // window * window].view(-1, window)
    losses = [float(model(input_ids=w[None], labels=w[None], use_cache=False).loss) for w in windows]
    return sum(losses) / len(losses)


def unigram_loss(train: Tensor, held_out: Tensor, vocab_size: int) -> float:
    """Cross-entropy in nats of the training split's token frequencies (add one) on the held-out split."""
    counts = torch.bincount(train, minlength=vocab_size).double() + 1
    return float(-(counts / counts.sum()).log()[held_out].mean())


@torch.no_grad()
def round_to_nearest(model: LlamaForCausalLM, bits: int, group_size: int) -> None:
    """Rounds every linear of the blocks in place: symmetric groups, scale = amax / ((2^bits - 1) / 2).

    Written here in plain torch, so that the card's figures do not hang on the code that they help to judge.
    """
    half = 2 ** (bits - 1)
    for linear in model.model.layers.modules():
        if isinstance(linear, torch.nn.Linear):
            groups = linear.weight.reshape(-1, group_size)
            scale = groups.abs().amax(1, keepdim=True) / (half - 0.5)
            codes = (groups / scale).round().clamp(-half, half - 1)
            linear.weight.copy_((codes * scale).view_as(linear.weight))


def train(plan: Plan, output: Path) -> dict[str, Any]:
    """Trains, keeps the best checkpoint in `output` and returns the record of the run."""
    train_texts, held_out_texts = builtin_documents("calibration"), builtin_documents("evaluation")
    tokenizer = train_tokenizer(train_texts, plan.vocab_size)
    stream, held_out = token_stream(tokenizer, train_texts), token_stream(tokenizer, held_out_texts)
    model = new_model(tokenizer, plan.seed)
    save_tokenizer(tokenizer, output)
    history = fit(model, stream, held_out, plan, output)
    return {
        "plan": asdict(plan),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parameters": model.num_parameters(),
        "data": {"training": describe(train_texts, stream), "held_out": describe(held_out_texts, held_out)},
        "history": history,
        "chosen": min(history, key=lambda entry: entry["held_out_loss"]),
        "perplexity": perplexities(output, held_out, stream),
        "config": model.config.to_dict(),
    }


def fit(model: LlamaForCausalLM, stream: Tensor, held_out: Tensor, plan: Plan, output: Path) -> list[dict[str, float]]:
    """The training loop; saves the model whenever the held-out loss is the lowest so far."""
    optimizer = optimizer_for(model, plan)
    history: list[dict[str, float]] = []
    losses: list[float] = []
    started = time.monotonic()
    for step, batch in enumerate(batches(stream, plan)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, plan)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), plan.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % plan.evaluate_every and step + 1 < plan.steps:
            continue
        entry = {
            "step": step + 1,
            "training_loss": round(sum(losses) / len(losses), 4),
            "held_out_loss": round(mean_loss(model, held_out), 4),
        }
        print(f"{time.monotonic() - started:6.0f} s  {entry}", flush=True)
        if all(entry["held_out_loss"] < earlier["held_out_loss"] for earlier in history):
            save_model(model, output)
        history.append(entry)
        losses.clear()
    return history


def perplexities(output: Path, held_out: Tensor, stream: Tensor) -> dict[str, float]:
    """Held-out perplexities of the saved model, as it is and rounded to nearest, in float32 arithmetic."""

    def saved() -> LlamaForCausalLM:
        model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(output, dtype=torch.float32)
        return model

    model = saved()
    loss = {
        "unigram": unigram_loss(stream, held_out, model.config.vocab_size),
        "training_text": mean_loss(model, stream[: len(held_out)]),
        "held_out": mean_loss(model, held_out),
        f"held_out_{CONTEXT}": mean_loss(model, held_out, CONTEXT),
    }
    for bits in (8, 4, 3, 2):
        model = saved()
        round_to_nearest(model, bits, group_size=128)
        loss[f"rtn_w{bits}_g128"] = mean_loss(model, held_out)
    return {name: round(math.exp(value), 4) for name, value in loss.items()}


def describe(texts: list[str], stream: Tensor) -> dict[str, Any]:
    """What a card says of a split: its size and its hash, which names the exact text without holding it."""
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return {
        "documents": len(texts),
        "characters": sum(map(len, texts)),
        "tokens": len(stream),
        "sha256": digest,
    }


def save_model(model: LlamaForCausalLM, output: Path) -> None:
    """Writes the weights in bfloat16 with their config; each file is replaced in one step."""
    rounded = copy.deepcopy(model).bfloat16()
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        rounded.save_pretrained(folder)
        move_files(Path(folder), output)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Writes the tokenizer under the class name that transformers 4 and 5 both know."""
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        tokenizer.save_pretrained(folder)
        config = Path(folder, "tokenizer_config.json")
        settings = json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        config.write_text(json.dumps(settings, indent=2) + "\n")
        move_files(Path(folder), output)


def move_files(folder: Path, output: Path) -> None:
    """Moves every file of a folder into the output, over what stands there."""
    output.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.chmod(0o644)
        path.replace(output / path.name)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the built-in model.")
    parser.add_argument("--output", type=Path, default=HERE.parents[1] / "quantkit" / "builtin")
    parser.add_argument("--steps", type=int, default=Plan.steps, help="fewer make a draft")
    arguments = parser.parse_args()
    plan = Plan(steps=arguments.steps)
    torch.set_num_threads(plan.threads)
    record = train(plan, arguments.output)
    (HERE / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    (arguments.output / "README.md").write_text(model_card(record))
    print(json.dumps(record["perplexity"], indent=2))


if __name__ == "__main__":
    main()
