"""What transforms need to know of model families, as data: what makes which channels, and who reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from quantkit.arch import is_linear, is_transposed


class Norm(Enum):
    """How a family normalises the residual stream."""

    RMS = "x / rms(x) · g"
    RMS_PLUS_ONE = "x / rms(x) · (1 + g)"
    LAYER = "(x - mean(x)) / std(x) · g + b"


class Source(Enum):
    """What makes the channels that the readers of a :class:`ScaleGroup` read, so that they can be scaled there."""

    NORM = "the gain (and bias) of a norm"
    ROWS = "the last output rows of a linear, behind which channels are only multiplied by other things"
    VALUES = "the last output rows of a linear, which are attention values: the heads of a group share them"
    VALUES_BY_HEAD = "the last third of the rows of each head of a linear that makes q, k and v head by head"


@dataclass(frozen=True, slots=True)
class ScaleGroup:
    """Linears that read the same channels, and what makes these channels; names are within the block.

    Attributes:
        kind: what the source is.
        source: a norm or a linear.
        readers: linears; nothing else reads the channels.
        parent: the smallest submodule that holds all readers and whose output depends on the channels through them.
        requires: attributes of the config and the values without which the group does not hold.
    """

    kind: Source
    source: str
    readers: tuple[str, ...]
    parent: str
    requires: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        return f"{self.source} -> {', '.join(self.readers)}"


@dataclass(frozen=True, slots=True)
class ResidualStream:
    """What reads from the residual stream and writes into it.

    Attributes:
        embeddings: modules of the model whose rows begin the stream: of tokens, and of learned positions.
        norms: within the block, each norm that reads the stream and the linears that read the norm.
        writers: linears of the block whose outputs are added to the stream.
        final_norm: module of the model in front of the head.
    """

    embeddings: tuple[str, ...]
    norms: tuple[tuple[str, tuple[str, ...]], ...]
    writers: tuple[str, ...]
    final_norm: str


@dataclass(frozen=True, slots=True)
class Structure:
    """What transforms need to know of a family.

    Attributes:
        norm: of every norm that is a source or reads the residual stream.
        groups: in the order of the data.
        residual: None where the stream cannot be rotated; ``refusal`` says why.
        refusal: a reason in words.
        requires: attributes of the config and the values without which none of this holds.
    """

    norm: Norm
    groups: tuple[ScaleGroup, ...]
    residual: ResidualStream | None
    refusal: str = ""
    requires: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of an attention: ``query // value`` query heads in a row read the same value head."""

    query: int
    value: int
    dim: int


def find_heads(config: Any) -> Heads:
    """The heads that a transformers config describes."""
    query = int(config.num_attention_heads)
    value = getattr(config, "num_key_value_heads", None) or query
    dim = getattr(config, "head_dim", None) or config.hidden_size // query
    return Heads(query, int(value), int(dim))


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_VALUES = ScaleGroup(Source.VALUES, "self_attn.v_proj", ("self_attn.o_proj",), "self_attn.o_proj")
_UP = ScaleGroup(Source.ROWS, "mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj")
_POST_NORMS = "its norms stand between the block's outputs and the residual stream and cannot be folded into them"

_LLAMA = Structure(
    Norm.RMS,
    (
        ScaleGroup(Source.NORM, "input_layernorm", _QKV, "self_attn"),
        _VALUES,
        ScaleGroup(Source.NORM, "post_attention_layernorm", _GATE_UP, "mlp"),
        _UP,
    ),
    ResidualStream(
        ("model.embed_tokens",),
        (("input_layernorm", _QKV), ("post_attention_layernorm", _GATE_UP)),
        ("self_attn.o_proj", "mlp.down_proj"),
        "model.norm",
    ),
)
_GEMMA = Structure(
    Norm.RMS_PLUS_ONE,
    (
        ScaleGroup(Source.NORM, "input_layernorm", _QKV, "self_attn"),
        _VALUES,
        ScaleGroup(Source.NORM, "pre_feedforward_layernorm", _GATE_UP, "mlp"),
        _UP,
    ),
    None,
    _POST_NORMS,
)
_PHI3 = Structure(
    Norm.RMS,
    (
        ScaleGroup(Source.NORM, "input_layernorm", ("self_attn.qkv_proj",), "self_attn"),
        ScaleGroup(Source.VALUES, "self_attn.qkv_proj", ("self_attn.o_proj",), "self_attn.o_proj"),
        ScaleGroup(Source.NORM, "post_attention_layernorm", ("mlp.gate_up_proj",), "mlp"),
        ScaleGroup(Source.ROWS, "mlp.gate_up_proj", ("mlp.down_proj",), "mlp.down_proj"),
    ),
    ResidualStream(
        ("model.embed_tokens",),
        (("input_layernorm", ("self_attn.qkv_proj",)), ("post_attention_layernorm", ("mlp.gate_up_proj",))),
        ("self_attn.o_proj", "mlp.down_proj"),
        "model.norm",
    ),
)
_OPT = Structure(
    Norm.LAYER,
    (
        ScaleGroup(Source.NORM, "self_attn_layer_norm", _QKV, "self_attn"),
        ScaleGroup(Source.VALUES, "self_attn.v_proj", ("self_attn.out_proj",), "self_attn.out_proj"),
        ScaleGroup(Source.NORM, "final_layer_norm", ("fc1",), "fc1"),
        # relu(x / s) = relu(x) / s for s > 0, which no other activation does.
        ScaleGroup(Source.ROWS, "fc1", ("fc2",), "fc2", requires=(("activation_function", "relu"),)),
    ),
    ResidualStream(
        ("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        (("self_attn_layer_norm", _QKV), ("final_layer_norm", ("fc1",))),
        ("self_attn.out_proj", "fc2"),
        "model.decoder.final_layer_norm",
    ),
    requires=(("do_layer_norm_before", True),),
)
_GPT2 = Structure(
    Norm.LAYER,
    (
        ScaleGroup(Source.NORM, "ln_1", ("attn.c_attn",), "attn"),
        ScaleGroup(Source.VALUES, "attn.c_attn", ("attn.c_proj",), "attn.c_proj"),
        ScaleGroup(Source.NORM, "ln_2", ("mlp.c_fc",), "mlp"),
    ),
    ResidualStream(
        ("transformer.wte", "transformer.wpe"),
        (("ln_1", ("attn.c_attn",)), ("ln_2", ("mlp.c_fc",))),
        ("attn.c_proj", "mlp.c_proj"),
        "transformer.ln_f",
    ),
    requires=(("add_cross_attention", False),),
)
_GPT_NEOX = Structure(
    Norm.LAYER,
    (
        ScaleGroup(Source.NORM, "input_layernorm", ("attention.query_key_value",), "attention"),
        ScaleGroup(Source.VALUES_BY_HEAD, "attention.query_key_value", ("attention.dense",), "attention.dense"),
        ScaleGroup(Source.NORM, "post_attention_layernorm", ("mlp.dense_h_to_4h",), "mlp"),
    ),
    ResidualStream(
        ("gpt_neox.embed_in",),
        (
            ("input_layernorm", ("attention.query_key_value",)),
            ("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
        ),
        ("attention.dense", "mlp.dense_4h_to_h"),
        "gpt_neox.final_layer_norm",
    ),
)
# q and k are normalised over all heads behind their projections, and nothing is normalised in front of them.
_OLMO2 = Structure(Norm.RMS, (_VALUES, _UP), None, _POST_NORMS)

STRUCTURES: Mapping[str, Structure] = MappingProxyType(
    {
        "llama": _LLAMA,
        "mistral": _LLAMA,
        "qwen2": _LLAMA,
        "qwen3": _LLAMA,
        "gemma2": _GEMMA,
        "gemma3_text": _GEMMA,
        "phi3": _PHI3,
        "opt": _OPT,
        "gpt2": _GPT2,
        "gpt_neox": _GPT_NEOX,
        "olmo2": _OLMO2,
    }
)


def find_structure(config: Any) -> Structure | str:
    """The structure of the family that a transformers config is of, without the groups that this model lacks.

    Returns:
        A reason in words where there is none.
    """
    known = STRUCTURES.get(config.model_type)
    if known is None:
        return f"the structure of {config.model_type} models is not known to transforms ({', '.join(STRUCTURES)} are)"
    for name, value in known.requires:
        if getattr(config, name, None) != value:
            return f"transforms know {config.model_type} models with {name}={value} only"
    groups = tuple(g for g in known.groups if all(getattr(config, n, None) == v for n, v in g.requires))
    return Structure(known.norm, groups, known.residual, known.refusal)


def misfit(structure: Structure, block: nn.Module, heads: Heads) -> str | None:
    """Why a block is not what the structure says; None when it is.

    Args:
        structure: of its family.
        block: a decoder block, on any device.
        heads: of its attention.
    """
    for group in structure.groups:
        for name in (group.source, group.parent, *group.readers):
            if not _has(block, name):
                return f"has no {name}"
        columns = {_shape(block.get_submodule(reader))[1] for reader in group.readers}
        if len(columns) != 1:
            return f"{', '.join(group.readers)} read different numbers of channels"
        reason = _source_misfit(group, block.get_submodule(group.source), columns.pop(), heads)
        if reason is not None:
            return f"{group.source}: {reason}"
    return None


def _source_misfit(group: ScaleGroup, source: nn.Module, columns: int, heads: Heads) -> str | None:
    if group.kind is Source.NORM:
        gain = getattr(source, "weight", None)
        return None if isinstance(gain, Tensor) and tuple(gain.shape) == (columns,) else "has no gain for each channel"
    if not is_linear(source):
        return "is not linear"
    rows = _shape(source)[0]
    if group.kind is Source.ROWS:
        return None if rows >= columns else f"makes {rows} channels, and {columns} are read"
    expected = 3 * heads.query * heads.dim if group.kind is Source.VALUES_BY_HEAD else heads.value * heads.dim
    if columns != heads.query * heads.dim or rows < expected or heads.query % heads.value:
        return f"does not fit {heads.query} heads of {heads.dim} that read {heads.value}"
    return None


def _has(module: nn.Module, name: str) -> bool:
    return any(name == other for other, _ in module.named_modules())


def _shape(linear: nn.Module) -> tuple[int, int]:
    """(out_features, in_features)."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    rows, columns = reversed(weight.shape) if is_transposed(linear) else weight.shape
    return int(rows), int(columns)
