"""What transforms need to know of model families, as data: what makes which channels, and who reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    VALUES_BY_HEAD = "the last rows of each head of a linear that makes values and other things head by head"


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
class Mixture:
    """A mixture of experts, which some blocks have in the place of their MLP; names are within the block.

    Every expert and every shared MLP has ``gate_proj``, ``up_proj`` and ``down_proj``.

    Attributes:
        experts: the module of the experts.
        routers: read what the experts read; they are not quantized.
        shared: MLPs that every token goes through.
    """

    experts: str
    routers: tuple[str, ...]
    shared: tuple[str, ...] = ()


class Set(Enum):
    """In the place of a config's value: any but None."""

    ANY = "any value"


@dataclass(frozen=True, slots=True)
class Structure:
    """What transforms need to know of a family.

    Attributes:
        norm: of every norm that is a source or reads the residual stream.
        groups: in the order of the data.
        residual: None where the stream cannot be rotated; ``refusal`` says why.
        refusal: a reason in words.
        requires: attributes of the config and the values without which none of this holds.
        mixture: what stands in some blocks in the place of the MLP, see :func:`structure_of_block`; of one block, what
            it has.
    """

    norm: Norm
    groups: tuple[ScaleGroup, ...]
    residual: ResidualStream | None
    refusal: str = ""
    requires: tuple[tuple[str, object], ...] = ()
    mixture: Mixture | None = None

    def is_expert(self, linear: str) -> bool:
        """Whether a linear of a block is an expert's."""
        return self.mixture is not None and linear.startswith(f"{self.mixture.experts}.")


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of an attention: ``query // value`` query heads in a row read the same value head."""

    query: int
    value: int
    dim: int


def find_heads(config: Any) -> Heads:
    """The heads that a transformers config describes; of latent attention (MLA), those of its values."""
    query = int(config.num_attention_heads)
    if getattr(config, "kv_lora_rank", None) is not None:
        return Heads(query, query, int(config.v_head_dim))
    value = getattr(config, "num_key_value_heads", None) or query
    dim = getattr(config, "head_dim", None) or config.hidden_size // query
    return Heads(query, int(value), int(dim))


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_VALUES = ScaleGroup(Source.VALUES, "self_attn.v_proj", ("self_attn.o_proj",), "self_attn.o_proj")
_UP = ScaleGroup(Source.ROWS, "mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj")
_SPARSE = "post_attention_layernorm"  # the norm in front of a mixture
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
_MIXTRAL = replace(_LLAMA, mixture=Mixture("mlp.experts", ("mlp.gate",)))
_QWEN2_MOE = replace(
    _LLAMA, mixture=Mixture("mlp.experts", ("mlp.gate", "mlp.shared_expert_gate"), ("mlp.shared_expert",))
)
_LATENTS = ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")
_DEEPSEEK = Structure(
    Norm.RMS,
    (
        ScaleGroup(Source.NORM, "input_layernorm", _LATENTS, "self_attn"),
        ScaleGroup(Source.NORM, "self_attn.q_a_layernorm", ("self_attn.q_b_proj",), "self_attn.q_b_proj"),
        ScaleGroup(Source.NORM, "self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",), "self_attn.kv_b_proj"),
        ScaleGroup(Source.VALUES_BY_HEAD, "self_attn.kv_b_proj", ("self_attn.o_proj",), "self_attn.o_proj"),
        *_LLAMA.groups[2:],
    ),
    ResidualStream(
        ("model.embed_tokens",),
        (("input_layernorm", _LATENTS), ("post_attention_layernorm", _GATE_UP)),
        ("self_attn.o_proj", "mlp.down_proj"),
        "model.norm",
    ),
    requires=(("q_lora_rank", Set.ANY),),
    mixture=Mixture("mlp.experts", ("mlp.gate",), ("mlp.shared_experts",)),
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
        "mixtral": _MIXTRAL,
        "qwen2_moe": _QWEN2_MOE,
        "qwen3_moe": _MIXTRAL,
        "deepseek_v3": _DEEPSEEK,
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
        if not _holds(config, name, value):
            wanted = f"a {name}" if value is Set.ANY else f"{name}={value}"
            return f"transforms know {config.model_type} models with {wanted} only"
    groups = tuple(g for g in known.groups if all(_holds(config, n, v) for n, v in g.requires))
    return replace(known, groups=groups, requires=())


def _holds(config: Any, name: str, value: object) -> bool:
    found = getattr(config, name, None)
    return found is not None if value is Set.ANY else bool(found == value)


def structure_of_block(structure: Structure, block: nn.Module) -> Structure:
    """The structure of one block: where it has a mixture of experts, every layer of every expert by its name.

    The norm in front of the mixture is read by its routers, and by every expert's and shared MLP's gate and up; within
    each of these, up makes what down reads.

    Args:
        structure: of the family.
        block: a decoder block whose experts are single layers.
    """
    mixture = structure.mixture
    if mixture is None or not _has(block, mixture.experts):
        return replace(structure, mixture=None)
    names = (name for name, _ in block.get_submodule(mixture.experts).named_children())
    mlps = [*(f"{mixture.experts}.{name}" for name in names if name.isdecimal()), *mixture.shared]
    readers = (*mixture.routers, *(f"{mlp}.{leaf}_proj" for mlp in mlps for leaf in ("gate", "up")))
    whole = mixture.experts.rpartition(".")[0]
    groups = [group for group in structure.groups if group.parent.partition(".")[0] != whole]
    groups.append(ScaleGroup(Source.NORM, _SPARSE, readers, whole))
    for mlp in mlps:
        groups.append(ScaleGroup(Source.ROWS, f"{mlp}.up_proj", (f"{mlp}.down_proj",), f"{mlp}.down_proj"))
    stream = structure.residual
    if stream is not None:
        norms = (*(pair for pair in stream.norms if pair[0] != _SPARSE), (_SPARSE, readers))
        kept = (writer for writer in stream.writers if writer.partition(".")[0] != whole)
        stream = replace(stream, norms=norms, writers=(*kept, *(f"{mlp}.down_proj" for mlp in mlps)))
    return replace(structure, groups=tuple(groups), residual=stream)


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
    if group.kind is Source.VALUES_BY_HEAD:
        fits = heads.value == heads.query and rows % heads.query == 0 and rows > heads.query * heads.dim
    else:
        fits = rows >= heads.value * heads.dim and heads.query % heads.value == 0
    if columns != heads.query * heads.dim or not fits:
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
