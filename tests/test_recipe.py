"""Recipes: strict YAML in, complete YAML out, and an error with line and nearest key for everything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from quantkit.calibration import CalibrationSpec
from quantkit.errors import RecipeError
from quantkit.recipe import Recipe, Rule, load_recipe, make_recipe, merged, parse_recipe, parse_size
from quantkit.scheme import QuantScheme
from quantkit.solvers import GPTQ, RTN


def refused(text: str) -> str:
    """The one line that a recipe is refused with."""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "my.yaml")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("my.yaml")
    return str(caught.value)


def parsed(text: str) -> Recipe:
    return make_recipe(parse_recipe(text, "my.yaml"))


FULL = """\
# every key
scheme: {bits: 3, group_size: 64, symmetric: false, act_bits: null}
method:
  name: gptq
  damp_percent: 0.05
  block_size: 64
rules:
  - match: lm_head
    scheme: w8a16
    method: rtn
  - match: "*.down_proj"
    skip: true
  - match: "re:.*k_proj"
    method: {name: gptq, damp_percent: 0.1}
calibration:
  source: texts/
  num_samples: 16
  sequence_length: 512
  packing: truncate
  seed: 7
  column: body
format: compressed-tensors
dtype: bfloat16
activation_memory: 512MiB
"""


def test_every_key() -> None:
    assert parsed(FULL) == Recipe(
        scheme=QuantScheme(3, 64, symmetric=False),
        method=GPTQ(damp_percent=0.05, block_size=64),
        rules=(
            Rule(match="lm_head", scheme=QuantScheme(8, None), method=RTN()),
            Rule(match="*.down_proj", skip=True),
            Rule(match="re:.*k_proj", method=GPTQ(damp_percent=0.1)),
        ),
        calibration=CalibrationSpec("texts/", 16, 512, "truncate", 7, "body"),
        format="compressed-tensors",
        dtype="bfloat16",
        activation_memory=512 * 2**20,
    )


def test_defaults() -> None:
    recipe = make_recipe({})
    assert recipe == Recipe()
    assert (recipe.scheme, recipe.method, recipe.rules) == (QuantScheme(4, 128), GPTQ(), ())
    assert (recipe.calibration, recipe.dtype) == (CalibrationSpec(), "auto")
    assert (recipe.format, recipe.activation_memory) == ("compressed-tensors", 2 * 2**30)
    assert parse_recipe("", "x") == parse_recipe("# nothing\n", "x") == parse_recipe("{}", "x") == {}


def test_only_what_is_stated_is_returned() -> None:
    """Flags go on top of it, and a default must not look like a statement."""
    assert parse_recipe("scheme: w4a16\ncalibration: {seed: 3}\n", "x") == {
        "scheme": "w4a16",
        "calibration": {"seed": 3},
    }


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("method: rtn", RTN()),
        ("method: gptq", GPTQ()),
        ("method: {name: rtn}", RTN()),
        ("method: {name: gptq}", GPTQ()),
        ("method: {name: gptq, block_size: 7}", GPTQ(block_size=7)),
        ("rules: []", GPTQ()),
    ],
)
def test_bare_names_and_mappings_of_methods(text: str, method: object) -> None:
    assert parsed(text).method == method


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
        ("zzz: 1", 1, "zzz", "allowed: scheme, method, rules, calibration, format, dtype, activation_memory"),
        ("1: 2", 1, "1", "allowed: "),
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
        ("scheme: w4a8", 1, "scheme"),
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
        ("format: gptq", 1, "format"),
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
    assert len(parsed("rules:\n- {match: a, skip: true}\n- {match: a, skip: true}").rules) == 2


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


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(FULL, encoding="utf-8")
    assert make_recipe(load_recipe(path)) == parsed(FULL)
    path.write_text("dtype: float128", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"r\.yaml, line 1: dtype"):
        load_recipe(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    binary, large = tmp_path / "binary.yaml", tmp_path / "large.yaml"
    binary.write_bytes(b"scheme: \xff\xfe")
    large.write_text("#" * (2**20 + 1))
    for path in (tmp_path / "absent.yaml", tmp_path, binary, large):
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2 * 2**30),
        ("512M", 512 * 2**20),
        ("1.5k", 1536),
        ("1.5 KiB", 1536),
        ("7", 7),
        ("0", 0),
        ("100B", 100),
        (" 3 MB ", 3 * 2**20),
        ("1tib", 2**40),
        (4096, 4096),
        (None, None),
        (2.5, 2.5),
    ],
)
def test_sizes(text: object, size: object) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e3", "2 GiB free", "2PiB", "0x10", "1,5G", "1..5G", "2G2"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


def test_a_size_of_hundreds_of_digits() -> None:
    assert "activation_memory" in refused(f"activation_memory: '{'9' * 400}'")


def test_merging() -> None:
    base = {"scheme": "w4a16", "calibration": {"seed": 1, "source": "a"}, "rules": [1]}
    over = {"calibration": {"seed": 2}, "rules": [2], "dtype": "auto"}
    before = yaml.safe_dump([base, over])
    assert merged(base, over) == {
        "scheme": "w4a16",
        "calibration": {"seed": 2, "source": "a"},
        "rules": [2],
        "dtype": "auto",
    }
    assert yaml.safe_dump([base, over]) == before
    assert merged({"scheme": "w4a16"}, {"scheme": {"bits": 8}}) == {"scheme": {"bits": 8}}
    assert merged({"scheme": {"bits": 8}}, {"scheme": "w4a16"}) == {"scheme": "w4a16"}
    assert merged({"method": {"name": "gptq", "block_size": 3}}, {}) == {"method": {"name": "gptq", "block_size": 3}}


NAMES = ["model.layers.0.self_attn.k_proj", "model.layers.10.mlp.down_proj", "lm_head"]


@pytest.mark.parametrize(
    ("match", "matched"),
    [
        ("lm_head", ["lm_head"]),
        ("*", NAMES),
        ("*.down_proj", [NAMES[1]]),
        ("model.layers.?.*", [NAMES[0]]),
        ("model.layers.[01].*", [NAMES[0]]),
        ("down_proj", []),  # the whole name, not a part of it
        ("LM_HEAD", []),
        ("model.layers.1*", [NAMES[1]]),
        ("re:.*k_proj", [NAMES[0]]),
        ("re:k_proj", []),
        ("re:model\\.layers\\.1", []),  # the whole name here too
        ("re:model\\.layers\\.\\d+\\..*", NAMES[:2]),
        ("re:lm.head", ["lm_head"]),
    ],
)
def test_what_a_rule_matches(match: str, matched: list[str]) -> None:
    rule = Rule(match=match, skip=True)
    assert [name for name in NAMES if rule.matches(name)] == matched


def test_the_first_rule_that_matches_decides() -> None:
    recipe = parsed(
        "scheme: w4a16\nmethod: gptq\nrules:\n"
        "- {match: '*.1.k_proj', scheme: w8a16}\n"
        "- {match: 're:.*k_proj', skip: true}\n"
        "- {match: '*.1.*', method: rtn}\n"
        "- {match: lm_head, scheme: w8a16, method: rtn}\n"
    )
    w4, w8 = QuantScheme(4, 128), QuantScheme(8, None)
    assert recipe.choice("layers.1.k_proj", in_block=True) == (w8, GPTQ())
    assert recipe.choice("layers.2.k_proj", in_block=True) is None
    assert recipe.choice("layers.1.v_proj", in_block=True) == (w4, RTN())
    assert recipe.choice("layers.2.v_proj", in_block=True) == (w4, GPTQ())
    assert recipe.choice("lm_head", in_block=False) == (w8, RTN())
    assert recipe.choice("score", in_block=False) is None  # outside of the blocks only when a rule asks
    assert parsed("rules: [{match: lm_head, skip: true}]").choice("lm_head", in_block=False) is None


def test_python_values() -> None:
    """What a caller of quantkit.quantize may put into a mapping."""
    recipe = make_recipe(
        {
            "scheme": QuantScheme(3, None, symmetric=False),
            "method": GPTQ(block_size=7),
            "rules": (Rule(match="a", skip=True), {"match": "b", "method": RTN(), "scheme": QuantScheme(8, 32)}),
            "calibration": CalibrationSpec(source="x.txt", seed=3),
            "activation_memory": 10,
        }
    )
    assert recipe == Recipe(
        scheme=QuantScheme(3, None, symmetric=False),
        method=GPTQ(block_size=7),
        rules=(Rule(match="a", skip=True), Rule(match="b", method=RTN(), scheme=QuantScheme(8, 32))),
        calibration=CalibrationSpec(source="x.txt", seed=3),
        activation_memory=10,
    )
    assert make_recipe(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    "value", [{"method": GPTQ}, {"scheme": object()}, {"rules": [len]}, {"format": "\ud800"}, {"scheme": {1, 2}}]
)
def test_python_values_that_are_not_plain(value: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe(value)
    assert "\n" not in str(caught.value)


def test_recipes_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Recipe().scheme = QuantScheme(8, None)  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Rule(match="a", skip=True).skip = False  # type: ignore[misc]


@pytest.mark.parametrize(
    "values", [{"scheme": "w9a16"}, {"shceme": "w4a16"}, {"rules": [{"match": "a"}]}, {"dtype": "int8"}]
)
def test_constructor_and_make_recipe_refuse_the_same(values: dict[str, Any]) -> None:
    """Built directly, a recipe raises pydantic's error, as documented; make_recipe raises quantkit's."""
    with pytest.raises(ValidationError):
        Recipe(**values)
    with pytest.raises(RecipeError):
        make_recipe(values)


SCHEMES = st.builds(QuantScheme, st.integers(2, 8), st.none() | st.integers(1, 512), st.booleans())
METHODS: st.SearchStrategy[RTN | GPTQ] = st.just(RTN()) | st.builds(
    GPTQ,
    damp_percent=st.floats(0, 1, exclude_min=True, exclude_max=True, allow_subnormal=False),
    block_size=st.integers(1, 10**6),
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
RULES = st.one_of(
    st.builds(Rule, match=TEXT.filter(lambda t: not t.startswith("re:")), skip=st.just(True)),
    st.builds(Rule, match=st.sampled_from(["lm_head", "re:.*", "*.up", "[x"]), scheme=SCHEMES),
    st.builds(Rule, match=st.sampled_from(["a: b", "#", "no", "1", "~"]), scheme=st.none() | SCHEMES, method=METHODS),
)
RECIPES = st.builds(
    Recipe,
    scheme=SCHEMES,
    method=METHODS,
    rules=st.lists(RULES, max_size=4).map(tuple),
    calibration=st.builds(
        CalibrationSpec,
        source=TEXT,
        num_samples=st.integers(1, 10**6),
        sequence_length=st.integers(2, 10**6),
        packing=st.sampled_from(["pack", "truncate"]),
        seed=st.integers(0, 2**70),
        column=st.none() | TEXT,
    ),
    dtype=st.sampled_from(["auto", "float32", "bfloat16", "float16"]),
    activation_memory=st.integers(0, 2**50),
)


@settings(deadline=None, max_examples=50)
@given(RECIPES)
def test_writing_and_reading_a_recipe_gives_an_equal_one(recipe: Recipe) -> None:
    text = recipe.to_yaml("two lines\nof heading")
    assert text.startswith("# two lines\n# of heading\n")
    assert parsed(text) == recipe
    assert parsed(text).to_yaml() == recipe.to_yaml()
    assert set(recipe.to_dict()) == set(Recipe.model_fields)
