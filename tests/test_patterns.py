"""Strangers' regular expressions: those of re, in bounded time."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import CheckpointError
from quantkit.patterns import Patterns, Targets

NAMES = ("model.layers.0.mlp.up_proj", "model.layers.11.self_attn.q_proj", "lm_head", "visual.blocks.3.qkv", "")
# As real configs hold them (llm-compressor, compressed-tensors, GPTQModel, AutoRound).
REAL = (
    r".*mlp.gate$",
    r"^(?!.*experts).*",
    r".*\.layers\.(?:0|1[0-9])\..*",
    r"model\.layers\.\d{1,2}\.(self_attn|mlp)\.(q|k|v|up)_proj",
    r"(?:.*\.)?visual\..*",
    r".*(?<!q)_proj",
    r"(?i)LM_HEAD",
    r"[^.]+\.layers\.[0-9]+\.",
    r".*layers\.\S+\.w+",
)


@pytest.mark.parametrize("pattern", REAL)
def test_real_patterns_match_as_re_does(pattern: str) -> None:
    patterns = Patterns("config.json")
    for name in NAMES:
        assert patterns.match(pattern, name) == (re.match(pattern, name) is not None)


PIECES = st.sampled_from(
    ["a", "b", ".", r"\.", r"\d", r"\w", "[ab]", "[^a]", "(?:a|b)", "(a.)", "(?!b)", "(?=.b)", "(?<=a)", "^", "$", "|"]
)
COUNTS = st.sampled_from(["", "", "", "*", "+", "?", "*?", "{2}", "{1,2}", "{,2}", "{1,}"])


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(PIECES, COUNTS), max_size=6), st.text("ab.1", max_size=8))
def test_patterns_that_are_read_mean_what_they_mean_in_re(pieces: list[tuple[str, str]], name: str) -> None:
    pattern = "".join(piece + count for piece, count in pieces)
    try:
        found = Patterns("x").match(pattern, name)
    except CheckpointError:  # re refuses it, or reads it in a way of its own, such as an assertion that is repeated
        return
    assert found == (re.match(pattern, name) is not None)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(", "not a regular expression"),
        ("*", "not a regular expression"),
        ("a{99999999999}", "repeats"),
        ("(?:a{1000}){1000}", "repeats"),
        ("a{e<=1}", "repeats"),
        ("(?R)", "a kind that is not read"),
        ("(?|a|b)", "a kind that is not read"),
        ("[[:alpha:]]", "a kind that is not read"),
        ("[a--b]", "a kind that is not read"),
        (r"\pL", "not a regular expression"),
        ("(" * 400 + ")" * 400, "400 opening brackets; at most 100 are read"),
        ("(" * 101 + ")" * 101, "101 opening brackets"),
        ("a" * 1001, "1001 characters"),
    ],
)
def test_refused(pattern: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        Patterns("config.json: ignore").match(pattern, "a")
    assert str(caught.value).startswith("config.json: ignore: ")
    assert len(str(caught.value)) < 400


def test_a_hundred_groups_are_read() -> None:
    assert Patterns("config.json: ignore").match("(" * 100 + "a" + ")" * 100, "a")


@pytest.mark.parametrize("pattern", ["(a|aa)+$", "(a|a)*b", "(.*a){20}b"])
def test_a_slow_pattern_is_stopped(pattern: str) -> None:
    start = time.thread_time()
    with pytest.raises(CheckpointError, match=r"takes more than 0\.2 s"):
        Patterns("config.json", seconds=0.2).match(pattern, "a" * 5000 + "!b")  # regex looks for the b first
    assert time.thread_time() - start < 5


def test_the_budget_is_of_all_patterns_and_names_together() -> None:
    patterns = Patterns("config.json", seconds=0.05)
    with pytest.raises(CheckpointError, match="takes more than"):
        assert [patterns.match("(a|a)*b", f"{'a' * 12}{index}!b") for index in range(10**6)] == []


def test_targets() -> None:
    targets = Targets(("lm_head", "re:.*up", "model.layers.1"), Patterns("x"))
    assert "lm_head" in targets
    assert "model.layers.0.mlp.up_proj" in targets
    assert "model.layers.11" not in targets
    assert (targets.has_name("lm_head"), targets.has_pattern("lm_head")) == (True, False)
