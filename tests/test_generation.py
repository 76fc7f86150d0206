"""Decoding: the static cache and the compiled step give the tokens of transformers' own generate()."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import torch
from layers import fastest_cpu
from torch import Tensor

import quantkit
import quantkit.attention
import quantkit.generation
import quantkit.linear
from quantkit.cli import main
from quantkit.generation import Decoder, Sampling, generate, prompt_tokens, stop_tokens
from quantkit.joining import join_linears
from quantkit.kernels.attend import attends_here
from quantkit.source import BUILTIN_PATH, open_tokenizer

NEVER: frozenset[int] = frozenset()
PROMPT = torch.tensor([1, 17, 30, 4, 99, 8, 51])
# Models whose cache has full, sliding and both kinds of layers; gpt2 has learned positions.
FAMILIES = ("llama", "qwen2", "gemma2", "gemma3_text", "gpt2")


def rounded(source: Path, target: Path, scheme: str = "w4a16_g32") -> Path:
    quantkit.quantize(source, target, recipe={"scheme": scheme, "method": "rtn"})
    return target


def theirs(model: Any, prompt: Tensor, count: int) -> list[int]:
    """Transformers' greedy tokens, by its dynamic cache."""
    ids = prompt[None]
    mask = torch.ones_like(ids)
    found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=None)
    tokens: list[int] = found[0, len(prompt) :].tolist()
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_transformers(family: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Past the sliding window of 16, for the families that have one; and again after the cache was used."""
    model = quantkit.load(rounded(tiny(family), tmp_path / "out"))
    expected = theirs(model, PROMPT, 24)
    decoder = Decoder(model, len(PROMPT) + 24)
    for _ in range(2):
        assert list(generate(decoder, PROMPT, 24, NEVER, Sampling())) == expected


@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        ("llama", "w4a16_g32"),
        ("qwen3", "w8a16"),
        ("llama", "w8a8"),
        ("gemma2", "w4a16_g32"),
        ("gemma3_text", "w8a16_g32"),
    ],
)
def test_the_step_is_one_graph_with_the_same_tokens(
    family: str, scheme: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """fullgraph=True: a graph break would be an error; aot_eager: nothing depends on a compiler that may be missing.

    Layers that read one input are joined for it, as generate does.
    """
    model = quantkit.load(rounded(tiny(family), tmp_path / "out", scheme), dtype="bfloat16")
    length = len(PROMPT) + 12  # past the sliding windows of 16
    eager = list(generate(Decoder(model, length), PROMPT, 12, NEVER, Sampling()))
    join_linears(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = Decoder(model, length, compiled=True, backend="aot_eager")
    assert list(generate(compiled, PROMPT, 12, NEVER, Sampling())) == eager
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # one, for all positions
    torch._dynamo.reset()


def test_the_step_in_machine_code(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """By Inductor, in C++: the eager step's logits, but for rounding; no Python of the model or its kernels runs."""
    if which("c++") is None and which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    model = quantkit.load(rounded(tiny("llama"), tmp_path / "out"), dtype="bfloat16", head_bits=8)
    join_linears(model)
    length = 2 * len(PROMPT) + 1
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        decoder = Decoder(model, length, compiled=compiled)
        found.append(torch.stack([decoder.prefill(PROMPT), *(decoder.step(int(token)) for token in PROMPT)]).float())
    files: list[str] = []
    sys.setprofile(lambda frame, event, _: files.append(frame.f_code.co_filename) if event == "call" else None)
    try:
        decoder.step(5)
    finally:
        sys.setprofile(None)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        decoder.step(6)
    torch._dynamo.reset()
    dispatched = {event.key for event in profile.key_averages() if event.key.startswith("quantkit::")}
    if fastest_cpu("w4a16_g32") == "cpu_jit":
        assert not dispatched  # compiled code calls the operators' own functions
    assert any("generation.py" in file for file in files)
    assert not [file for file in files if "modeling_llama" in file or file == quantkit.linear.__file__]
    if fastest_cpu("w4a16_g32") == "cpu_jit":
        assert not [file for file in files if "kernels" in file]
    error = (found[0] - found[1]).norm() / found[0].norm()
    assert error < 0.02
    assert torch.equal(found[0].argmax(-1), found[1].argmax(-1))


def test_compiled_decoders_take_turns(tiny: Callable[[str], Path]) -> None:
    """Of two models, and of one with two lengths: a step looks at its tokens only, and still is its own decoder's."""
    torch._dynamo.reset()
    one, other = (quantkit.load(tiny(family), dtype="float32") for family in ("llama", "qwen2"))
    cases = [(one, 14), (other, 14), (one, 100)]
    eager = [Decoder(model, length) for model, length in cases]
    compiled = [Decoder(model, length, compiled=True, backend="aot_eager") for model, length in cases]
    prompts = [PROMPT, PROMPT + 3, PROMPT.flip(0)]
    for decoders in (eager, compiled):
        for decoder, prompt in zip(decoders, prompts, strict=True):
            decoder.prefill(prompt)
    for token in (5, 80, 7):
        for expected, found in zip(eager, compiled, strict=True):
            torch.testing.assert_close(found.step(token), expected.step(token))
    torch._dynamo.reset()


def test_a_step_checks_its_tokens_only(tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the thousands of things about the model's modules that torch.compile would look at in every step."""
    kept: list[str] = []
    choose = quantkit.generation._about_tokens

    def chosen(guards: Any) -> list[bool]:
        keep = choose(guards)
        kept.extend(guard.name for guard, own in zip(guards, keep, strict=True) if own)
        assert len(guards) > 100
        return keep

    monkeypatch.setattr(quantkit.generation, "_about_tokens", chosen)
    torch._dynamo.reset()
    decoder = Decoder(quantkit.load(tiny("llama"), dtype="float32"), 14, compiled=True, backend="aot_eager")
    decoder.prefill(PROMPT)
    decoder.step(3)
    torch._dynamo.reset()
    assert {name for name in kept if name} <= {"ids", "L['ids']"}
    assert any(kept)


def test_a_stop_token_is_the_last(tiny: Callable[[str], Path]) -> None:
    model = quantkit.load(tiny("llama"))
    tokens = list(generate(Decoder(model, 40), PROMPT, 12, NEVER, Sampling()))
    stop = tokens[5]
    ended = list(generate(Decoder(model, 40), PROMPT, 12, frozenset({stop}), Sampling()))
    assert ended == tokens[: tokens.index(stop) + 1]
    assert stop_tokens(model) == {2}


def test_what_a_step_reads_of_the_cache(tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of room for 20 tokens and a few more, those that are filled; by torch's attention all."""
    for one_a_token in (attends_here(), False):
        monkeypatch.setattr(quantkit.attention, "attends_here", lambda chosen=one_a_token: chosen)
        decoder = Decoder(quantkit.load(tiny("llama")), 20)
        decoder.prefill(PROMPT)
        token = 3 * 2 * 2 * 16 * 4  # layers, keys and values, heads, their size, float32
        assert decoder.cache_bytes(7) == token * (7 if one_a_token else 32)


def test_sampling_is_drawn_from_the_probabilities() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    choose = Sampling(temperature=1.0).chooser()
    counts = torch.bincount(torch.tensor([choose(logits) for _ in range(4000)]), minlength=4) / 4000
    torch.testing.assert_close(counts, logits.exp(), atol=0.04, rtol=0)
    nucleus = Sampling(temperature=1.0, top_p=0.7).chooser()
    assert {nucleus(logits) for _ in range(300)} == {0, 1}
    cold = Sampling(temperature=0.01).chooser()
    assert {cold(logits) for _ in range(50)} == {0}


def test_the_seed_decides_and_the_global_state_stays() -> None:
    logits = torch.zeros(100)
    before = torch.get_rng_state()
    draws = [[choose(logits) for _ in range(20)] for choose in (Sampling(1.0, seed=s).chooser() for s in (3, 3, 4))]
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("temperature", "top_p", "what"),
    [(-1.0, 1.0, "temperature"), (float("nan"), 1.0, "temperature"), (1.0, 0.0, "top-p")],
)
def test_sampling_out_of_range(temperature: float, top_p: float, what: str) -> None:
    with pytest.raises(quantkit.InputError, match=what):
        Sampling(temperature, top_p)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["quantkit", "generate", *map(str, arguments)])
    main()


def test_the_command_streams_the_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, "builtin", "--prompt", "Return the ", "--max-new-tokens", 12)
    assert ended.value.code in (0, None)
    tokenizer, model = open_tokenizer(BUILTIN_PATH), quantkit.load("builtin")
    tokens = prompt_tokens(tokenizer, "Return the ")
    found = list(generate(Decoder(model, len(tokens) + 12), tokens, 12, stop_tokens(model), Sampling()))
    assert capsys.readouterr().out.strip() == str(tokenizer.decode(found, skip_special_tokens=True)).strip() != ""


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--prompt", "a", "--max-new-tokens", 4000), "positions"),
        (("--prompt", "a", "--temperature", -1), "--temperature"),
        (("--prompt", "a", "--chat"), "no chat template"),
        (("--prompt", "a", "--backend", "nonsense"), "no backend 'nonsense'"),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[object, ...],
    what: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    model = rounded(BUILTIN_PATH, tmp_path / "out") if "--backend" in arguments else "builtin"
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, model, *arguments)
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert what in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_an_architecture_without_a_static_cache(tiny: Callable[[str], Path]) -> None:
    model = quantkit.load(tiny("llama"))
    type(model)._can_compile_fullgraph = False
    try:
        with pytest.raises(quantkit.InputError, match="no static cache"):
            Decoder(model, 10)
    finally:
        type(model)._can_compile_fullgraph = True
