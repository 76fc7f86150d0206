"""Attention of a decoding step on a CPU by quantkit's own operator, in the place that transformers has for such."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantkit.kernels.attend import attend_step, attends_here, why_not_attend
from quantkit.kernels.attend_ir import LANES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "quantkit_step"
"""What transformers calls it, in ``model.config._attn_implementation``."""

ROOM = LANES
"""A static cache has room for a multiple of so many tokens."""

# What a model may give beside queries, keys, values and their mask that changes the result.
_OTHERS = ("softcap", "position_bias", "s_aux", "cache", "output_attentions")


def attend_by_steps(model: PreTrainedModel) -> bool:
    """Give a model this attention where it has torch's, in place; whether it has it now.

    Prompts, and whatever the operator does not do, go to torch's as before.
    """
    if model.config._attn_implementation == NAME:
        return True
    torchs = model.config._attn_implementation == "sdpa" and getattr(model, "_supports_attention_backend", False)
    if not torchs or model.device.type != "cpu" or not attends_here():
        return False
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])
    model.set_attn_implementation(NAME)
    return True


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: queries [1, heads, tokens, size] -> [1, tokens, heads, value size]."""
    plain = dropout == 0 and not any(others.get(name) is not None for name in _OTHERS)
    differentiable = torch.is_grad_enabled() and query.requires_grad
    if plain and not differentiable and why_not_attend(query, key, value, attention_mask) is None:
        assert attention_mask is not None
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attend_step(query, key, value, attention_mask, scale), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **others)
