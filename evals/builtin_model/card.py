"""The model card of the built-in model, filled in from the record of its training run."""

from __future__ import annotations

from typing import Any

CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# The model that ships with quantkit

A small Llama ({parameters:,} parameters) that quantkit trains itself, so that its demo, its tests and
your first steps run offline and on weights with real structure. It continues text about Python in a
plausible tone and knows nothing: use it to try quantization, not to answer questions.

This card and `evals/builtin_model/results.json` are written by `python evals/builtin_model/train.py`, the
one command that made the model.

## Architecture

`LlamaForCausalLM`: hidden size {hidden_size}, intermediate size {intermediate_size}, {num_hidden_layers}
blocks, {num_attention_heads} query heads and {num_key_value_heads} key-value heads of {head_dim}, tied
embeddings, {max_position_embeddings} positions, bfloat16 safetensors. The tokenizer is a byte-level BPE
of {vocab_size} tokens, trained on the same text, that puts one `<s>` in front.

## Data

The `builtin` source (`quantkit/builtin_text.py`): the language reference in `pydoc_data.topics` and the
docstrings of the standard library, read from the Python installation at run time and never copied. Whole
topics and packages go to one split, and no paragraph stands in both. Read under Python {python}:

| split | documents | characters | tokens | SHA-256 of the text |
|---|---|---|---|---|
{data}

Under another Python the text, and so every figure here, differs a little, and a paragraph may have moved
from one module to another since; the splits of one Python never overlap.

## Training

{steps} steps of {tokens_per_step} tokens ({epochs:.1f} times the training text): {stages}. Half of the
windows begin with `<s>`. AdamW {betas}, peak learning rate {learning_rate:g} after {warmup_steps}
steps of warm-up, cosine down to {final_learning_rate:g}, weight decay {weight_decay:g}, gradients clipped
at {gradient_clip:g}, bfloat16 autocast on {threads} CPU threads, seed {seed}; torch {torch}, transformers
{transformers}.

| step | training loss | held-out loss |
|---|---|---|
{history}

Losses are in nats a token; the training loss is the mean since the row before. Step {chosen_step} is
shipped, the one with the lowest held-out loss: the held-out text chose among these rows, which flatters
its loss a little.

## Perplexity

| model | held-out perplexity | against bfloat16 |
|---|---|---|
{perplexity}

Protocol: the documents of the evaluation split after one another, each `<s>` ... `</s>`, cut into windows
of 512 tokens that do not overlap; the first token of each window is not scored; weights as shipped,
arithmetic in float32. In windows of {max_position_embeddings} tokens the shipped model has
{long_context:.2f}; on an equally long stretch of its training text, {training_text:.2f}. Rounded to
nearest: all linear layers of the blocks, symmetric, groups of 128 inputs,
`scale = amax / ((2^bits - 1) / 2)`.

## Licence

Apache-2.0, as quantkit. The training text is part of Python, under the Python Software Foundation
License; none of it is shipped with the model.
"""

ROWS = {
    "unigram": "token frequencies of the training text alone",
    "held_out": "**as shipped, bfloat16**",
    "rtn_w8_g128": "8-bit, rounded to nearest",
    "rtn_w4_g128": "4-bit, rounded to nearest",
    "rtn_w3_g128": "3-bit, rounded to nearest",
    "rtn_w2_g128": "2-bit, rounded to nearest",
}


def model_card(record: dict[str, Any]) -> str:
    """The card as Markdown, from what `train.train` returns."""
    plan, perplexity, chosen = record["plan"], record["perplexity"], record["chosen"]
    tokens_per_step = plan["stages"][0]["batch_size"] * plan["stages"][0]["window"]
    stages = (f"{s['share']:.0%} in windows of {s['window']} tokens, {s['batch_size']} a step" for s in plan["stages"])
    return CARD.format(
        **plan | record["config"] | {"stages": ", then ".join(stages), "perplexity": perplexity_rows(perplexity)},
        python=record["python"],
        torch=record["torch"],
        transformers=record["transformers"],
        parameters=record["parameters"],
        tokens_per_step=tokens_per_step,
        epochs=plan["steps"] * tokens_per_step / record["data"]["training"]["tokens"],
        data="\n".join(
            f"| {split} | {d['documents']} | {d['characters']:,} | {d['tokens']:,} | `{d['sha256']}` |"
            for split, d in record["data"].items()
        ),
        history="\n".join(
            f"| {row['step']} | {row['training_loss']:.3f} | {row['held_out_loss']:.3f} |" for row in record["history"]
        ),
        chosen_step=chosen["step"],
        long_context=perplexity["held_out_2048"],
        training_text=perplexity["training_text"],
    )


def perplexity_rows(perplexity: dict[str, float]) -> str:
    """The table of perplexities, each with its change against the shipped model."""
    shipped = perplexity["held_out"]
    return "\n".join(
        f"| {label} | {perplexity[name]:.2f} | {perplexity[name] / shipped - 1:+.2%} |" for name, label in ROWS.items()
    )
