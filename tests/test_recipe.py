"""Recipes: strict YAML in, complete YAML out; test_recipe_errors.py has what is refused."""

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
