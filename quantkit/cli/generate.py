"""``quantkit generate``."""

from __future__ import annotations

from typing import Annotated

import typer

from quantkit.cli.options import Device, Dtype, HeadBits, quiet


def generate(
    model: Annotated[str, typer.Argument(help="A model directory (dense or quantized), a hub id, or builtin.")],
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token; 1: as the model says.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the most likely tokens that hold this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's turn in the chat template.")] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the step: a minute or more at first, then faster.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: Annotated[str | None, typer.Option(help="Kernel backend, see quantkit doctor.")] = None,
    head_bits: HeadBits = None,
) -> None:
    """Write on from a prompt; the text appears token by token."""
    from transformers import TextStreamer

    from quantkit.generation import Decoder, Sampling, prompt_tokens, stop_tokens
    from quantkit.generation import generate as tokens_after
    from quantkit.opening import open_for_decoding
    from quantkit.rounded_head import check_head_bits
    from quantkit.source import open_tokenizer, resolve_model

    quiet()
    check_head_bits(head_bits)
    sampling = Sampling(temperature, top_p, seed)
    path = resolve_model(model)
    tokenizer = open_tokenizer(path)
    tokens = prompt_tokens(tokenizer, prompt, chat=chat)
    opened, notes = open_for_decoding(path, device=device, dtype=dtype, backend=backend, head_bits=head_bits)
    for note in notes:
        typer.echo(note, err=True)
    length = len(tokens) + max_new_tokens
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    for token in tokens_after(
        Decoder(opened, length, compiled=compiled), tokens, max_new_tokens, stop_tokens(opened), sampling
    ):
        streamer.put(tokens.new_tensor([token]))
    streamer.end()
