"""What is wrong with a recipe is said in one line: the file, the line, the key, and the nearest key that is allowed."""

from __future__ import annotations

import pytest

from quantkit.errors import RecipeError
from quantkit.recipe import parse_recipe


def refused(text: str) -> str:
    """The one line that a recipe is refused with."""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "my.yaml")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("my.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "line", "key", "hint"),
    [
        ("schem: w4a16", 1, "schem", "did you mean scheme?"),
        ("# first\n\nmethod: rtn\nrule: []", 4, "rule", "did you mean rules?"),
        ("dtype: auto\nactivation_memmory: 1GiB", 2, "activation_memmory", "did you mean activation_memory?"),
        ("rules:\n- match: a\n  skip: true\n- match: b\n  skpi: true", 5, "rules.1.skpi", "did you mean skip?"),
        ("rules:\n- macth: a\n  match: b\n  skip: true", 2, "rules.0.macth", "did you mean match?"),
        ("method:\n  name: gptq\n  damp_precent: 0.1", 3, "method.damp_precent", "did you mean damp_percent?"),
        ("method: {name: gptq,\n  blocksize: 1}", 2, "method.blocksize", "did you mean block_size?"),
        (
            "rules:\n- match: a\n  method:\n    name: gptq\n    block_sizes: 3",
            5,
            "rules.0.method.block_sizes",
            "did you mean block_size?",
        ),
        ("calibration:\n  seed: 1\n  num_sample: 3", 3, "calibration.num_sample", "did you mean num_samples?"),
        ("calibration: {sequence_lenght: 3}", 1, "calibration.sequence_lenght", "did you mean sequence_length?"),
        ("scheme:\n  bits: 4\n  group_size: 128\n  symetric: false", 4, "scheme.symetric", "did you mean symmetric?"),
        (
            "rules:\n- match: a\n  scheme: {bits: 4, group_size: null,\n    symetric: true}",
            4,
            "rules.0.scheme.symetric",
            "did you mean symmetric?",
        ),
        ("zzz: 1", 1, "zzz", "allowed: scheme, method, "),
        ("1: 2", 1, "1", "allowed: "),
        ("transforms:\n- name: awq\n  gird: 3", 3, "transforms.0.gird", "did you mean grid?"),
        ("transforms: [rotation, {name: smoothquant, alhpa: 1}]", 1, "transforms.1.alhpa", "did you mean alpha?"),
    ],
)
def test_unknown_keys_name_the_nearest_and_the_line(text: str, line: int, key: str, hint: str) -> None:
    found = refused(text)
    assert found.startswith(f"my.yaml, line {line}: unknown key {key!r}; ")
    assert hint in found


@pytest.mark.parametrize(
    ("text", "line", "key", "hint"),
    [
        ("scheme:\n  bits: 4\n  groupsize: 128", 3, "scheme.groupsize", "did you mean group_size?"),
        ("scheme:\n  bitz: 4\n  group_size: 128", 2, "scheme.bitz", "did you mean bits?"),
        ("rules:\n- skip: true\n  macth: a", 3, "rules.0.macth", "did you mean match?"),
    ],
)
def test_misspelled_keys_that_are_needed(text: str, line: int, key: str, hint: str) -> None:
    found = refused(text)
    assert found.startswith(f"my.yaml, line {line}: unknown key {key!r}; ")
    assert hint in found


@pytest.mark.parametrize("text", ["method: {name: gptq, zzz: 1}", "scheme: {bits: 4, group_size: 128, zzz: 1}"])
def test_only_options_are_proposed(text: str) -> None:
    found = refused(text)
    assert "needs" not in found
    assert "__pydantic_config__" not in found


def test_a_method_without_a_name() -> None:
    assert "line 2: method: the method has no name; add name:" in refused("dtype: auto\nmethod: {nmae: gptq}")


@pytest.mark.parametrize("name", ["gptq", "rtn"])
def test_a_methods_name_as_a_key(name: str) -> None:
    assert f"unknown key {name!r}" in refused(f"{name}:\n  damp_percent: 0.1\n")


def test_a_methods_name_as_a_key_of_a_method() -> None:
    assert "unknown key 'method.rtn'" in refused("method: {name: gptq, rtn: 1}")


def test_an_option_of_another_method_is_not_proposed() -> None:
    found = refused("method: {name: rtn, damp_percent: 0.1}")
    assert "unknown key 'method.damp_percent'" in found
    assert "did you mean damp_percent?" not in found


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("scheme: 4", 1, "scheme"),
        ("scheme: [w4a16]", 1, "scheme"),
        ("scheme: null", 1, "scheme"),
        ("dtype: auto\nscheme: w9a16", 2, "scheme"),
        ("scheme: w4a4", 1, "scheme"),
        ("scheme: int4", 1, "scheme"),
        ("scheme:\n  group_size: 128", 1, "scheme.bits"),
        ("scheme:\n  bits: 4", 1, "scheme.group_size"),
        ("scheme:\n  group_size: 128\n  bits: '4'", 3, "scheme.bits"),
        ("scheme:\n  bits: 4.0\n  group_size: 128", 2, "scheme.bits"),
        ("scheme:\n  bits: 4\n  group_size: 128\n  symmetric: 1", 4, "scheme.symmetric"),
        ("scheme:\n  bits: 4\n  group_size: 0", 1, "scheme"),
        ("method: awq", 1, "method"),
        ("method: GPTQ", 1, "method"),
        ("method: [gptq]", 1, "method"),
        ("method: {damp_percent: 0.1}", 1, "method"),
        ("method: 4", 1, "method"),
        ("method:\n  name: gptq\n  damp_percent: 2.0", 1, "method"),
        ("method:\n  name: gptq\n  damp_percent: '0.1'", 3, "method.damp_percent"),
        ("method:\n  name: gptq\n  damp_percent: true", 3, "method.damp_percent"),
        ("method:\n  name: gptq\n  block_size: 0", 1, "method"),
        ("method:\n  name: gptq\n  block_size: 1.5", 3, "method.block_size"),
        ("method:\n  name: gptq\n  block_size: yes", 3, "method.block_size"),
        ("rules: {match: a}", 1, "rules"),
        ("rules: null", 1, "rules"),
        ("rules:\n- a", 2, "rules.0"),
        ("rules:\n- match: a\n  skip: true\n- skip: true", 4, "rules.1.match"),
        ("rules:\n- match: ''\n  skip: true", 2, "rules.0.match"),
        ("rules:\n- match: 3\n  skip: true", 2, "rules.0.match"),
        ("rules:\n- skip: true\n  match: 're:('", 3, "rules.0.match"),
        ("rules:\n- match: a", 2, "rules.0"),
        ("rules:\n- match: a\n  skip: false", 2, "rules.0"),
        ("rules:\n- match: a\n  skip: true\n  scheme: w4a16", 2, "rules.0"),
        ("rules:\n- match: a\n  skip: true\n  method: rtn", 2, "rules.0"),
        ("rules:\n- match: a\n  skip: 'yes'", 3, "rules.0.skip"),
        ("rules:\n- match: a\n  method: sparsegpt", 3, "rules.0.method"),
        ("rules:\n- match: a\n  scheme: w1a16", 3, "rules.0.scheme"),
        ("calibration: wikitext", 1, "calibration"),
        ("calibration: []", 1, "calibration"),
        ("calibration:\n  num_samples: 0", 1, "calibration"),
        ("calibration:\n  source: a\n  num_samples: '5'", 3, "calibration.num_samples"),
        ("calibration:\n  num_samples: 1.5", 2, "calibration.num_samples"),
        ("calibration:\n  seed: -1", 1, "calibration"),
        ("calibration:\n  seed: true", 2, "calibration.seed"),
        ("calibration:\n  packing: random", 2, "calibration.packing"),
        ("calibration:\n  source: null", 2, "calibration.source"),
        ("format: gguf", 1, "format"),
        ("dtype: float64", 1, "dtype"),
        ("dtype: 16", 1, "dtype"),
        ("activation_memory: -1", 1, "activation_memory"),
        ("activation_memory: 1.5", 1, "activation_memory"),
        ("activation_memory: lots", 1, "activation_memory"),
        ("activation_memory: true", 1, "activation_memory"),
        ("activation_memory: .inf", 1, "activation_memory"),
        ("activation_memory: null", 1, "activation_memory"),
    ],
)
def test_wrong_values_name_the_key_and_the_line(text: str, line: int, key: str) -> None:
    assert refused(text).startswith(f"my.yaml, line {line}: {key}: ")


def test_what_was_given_is_shown() -> None:
    assert "'float64'" in refused("dtype: float64")
    assert "'w9a16'" in refused("scheme: w9a16")
    assert "'awq'" in refused("method: awq")
    assert "'re:('" in refused("rules: [{match: 're:(', skip: true}]")


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("scheme: w4a16\nmethod: rtn\nscheme: w8a16", 3, "scheme"),
        ("rules:\n- match: a\n  skip: true\n  match: b", 4, "match"),
        ("calibration: {seed: 1,\n  seed: 2}", 2, "seed"),
        ("method:\n  name: gptq\n  'name': rtn", 3, "name"),
    ],
)
def test_duplicates_are_refused(text: str, line: int, key: str) -> None:
    assert refused(text).startswith(f"my.yaml, line {line}: key {key!r} stands twice; ")


def test_equal_keys_in_different_rules_are_no_duplicates() -> None:
    rules = parse_recipe("rules:\n- {match: a, skip: true}\n- {match: a, skip: true}", "x")["rules"]
    assert len(rules) == 2


@pytest.mark.parametrize(
    "text",
    [
        "a: &x 1\nb: *x",
        "calibration: &c {seed: 1}\nmethod: *c",
        "rules: &r [{match: a, skip: true}]\ncalibration: {source: *r}",
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]",
    ],
)
def test_aliases_are_refused(text: str) -> None:
    assert "alias" in refused(text)


@pytest.mark.parametrize(
    "text",
    [
        "scheme: [w4a16",
        "scheme: w4a16\n  method: rtn",
        "\tscheme: w4a16",
        "scheme: !!python/object/apply:os.system [ls]",
        "scheme: !!python/name:os.system",
        "scheme: w4a16\n---\nscheme: w4a16",
        "a: \x07",
        "[" * 300,
        "calibration: {seed: " + "9" * 5000 + "}",
        "- scheme",
        "w4a16",
        "3",
        "format: !!binary /wD/",
    ],
)
def test_what_is_no_mapping_of_plain_values_is_refused(text: str) -> None:
    refused(text)


def test_deep_nesting_is_refused() -> None:
    assert "recursion" in refused("a: " + "{a: " * 2000 + "1" + "}" * 2000)


@pytest.mark.parametrize("text", ["? [a, b]\n: 1", "? {a: 1}\n: 1"])
def test_keys_that_are_no_scalars(text: str) -> None:
    refused(text)


def test_a_size_of_hundreds_of_digits() -> None:
    assert "activation_memory" in refused(f"activation_memory: '{'9' * 400}'")
