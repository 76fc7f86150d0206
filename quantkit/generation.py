"""Decoding token by token: a static key-value cache, and a step that torch can compile as one graph."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from quantkit.attention import ROOM, attend_by_steps
from quantkit.errors import InputError, KernelError, first_line, message
from quantkit.kernels.native_op import c_functions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen from its logits.

    Attributes:
        temperature: logits are divided by it before one is drawn; 0 takes the most likely token.
        top_p: a token is drawn from the smallest set of most likely ones whose probabilities sum to it.
        seed: of the draws; they are this object's own, torch's global state is not touched.

    Raises:
        InputError: out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InputError(message("--temperature", f"{self.temperature} is out of range", "choose 0 or more"))
        if not 0 < self.top_p <= 1:
            raise InputError(message("--top-p", f"{self.top_p} is out of range", "choose above 0, at most 1"))

    def chooser(self) -> Callable[[Tensor], int]:
        """A function from logits [vocabulary] to the next token."""
        generator = torch.Generator().manual_seed(self.seed)

        def choose(logits: Tensor) -> int:
            if self.temperature == 0:
                return int(logits.argmax())
            probabilities = (logits.float().cpu() / self.temperature).softmax(-1)
            if self.top_p < 1:
                probabilities = _nucleus(probabilities, self.top_p)
            return int(torch.multinomial(probabilities, 1, generator=generator))

        return choose


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Those outside of the smallest set that holds ``top_p`` become 0 (arXiv:1904.09751, section 3.1)."""
    ordered, places = probabilities.sort(descending=True, stable=True)
    outside = ordered.cumsum(-1) - ordered >= top_p
    return probabilities.scatter(-1, places[outside], 0.0)


class Decoder:
    """One sequence through a model, token by token.

    Args:
        model: as :func:`quantkit.load` returns it. Its attention is set to quantkit's where that runs
            (:mod:`quantkit.attention`).
        length: tokens that the cache has room for, those of the prompt counted.
        compiled: whether the step is compiled, as one graph without a break; its first call takes up to minutes. From
            then on it is the step of the model as it was then: what becomes of its modules is not looked at again.
        backend: torch.compile's, for tests.

    Raises:
        InputError: the model has fewer positions, or is of a kind that has no static cache.
    """

    def __init__(
        self, model: PreTrainedModel, length: int, *, compiled: bool = False, backend: str = "inductor"
    ) -> None:
        check_length(model, length)
        self._device, self._compiled = model.device, compiled
        self._cache = _static_cache(model, -(-length // ROOM) * ROOM)
        self._reads_filled = attend_by_steps(model)
        self._forward = _forward(model, self._cache)
        self._step = _compiled(self._forward, backend, model.device) if compiled else self._forward

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of the cache's keys and values that a step reads.

        Args:
            tokens: of the text so far. Torch's attention goes over the whole cache, quantkit's over these.
        """
        tensors = (tensor for layer in self._cache.layers for tensor in (layer.keys, layer.values))
        found = [tensor for tensor in tensors if tensor is not None]
        return sum(
            tensor.nbytes * tokens // tensor.shape[2] if self._reads_filled else tensor.nbytes for tensor in found
        )

    @torch.inference_mode()
    def prefill(self, tokens: Tensor) -> Tensor:
        """Start a sequence over.

        Args:
            tokens: int64 [length], at least one.

        Returns:
            logits [vocabulary] of the token that follows.
        """
        self._cache.reset()
        return self._logits(self._forward, tokens)

    @torch.inference_mode()
    def step(self, token: int) -> Tensor:
        """Append a token; returns the logits [vocabulary] of the next one.

        Raises:
            KernelError: the step cannot be compiled here.
        """
        tokens = torch.tensor([token])
        if not self._compiled:
            return self._logits(self._step, tokens)
        try:
            with _uncollected():
                return self._logits(self._step, tokens)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = first_line(error)
            fix = "leave --compile out, or install what torch.compile needs here (a C++ compiler on a CPU)"
            raise KernelError(message("--compile", f"torch cannot compile the step ({reason})", fix)) from error

    def _logits(self, forward: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        return forward(tokens[None].to(self._device))[0, -1]


def generate(
    decoder: Decoder, prompt: Tensor, max_new_tokens: int, stops: frozenset[int], sampling: Sampling
) -> Iterator[int]:
    """The tokens that follow a prompt, each as soon as it is known; ends after one of ``stops``, which is given too.

    Args:
        decoder: with room for all of them.
        prompt: int64 [length].
        max_new_tokens: at most so many.
        stops: tokens that end the text.
        sampling: how each is chosen.
    """
    choose = sampling.chooser()
    logits = decoder.prefill(prompt)
    for remaining in range(max_new_tokens, 0, -1):
        token = choose(logits)
        yield token
        if token in stops or remaining == 1:
            return
        logits = decoder.step(token)


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool = False) -> Tensor:
    """int64 [length]: the tokens of a prompt, special ones as the tokenizer adds them.

    Args:
        tokenizer: the model's.
        prompt: any text.
        chat: the text is a user's turn, and the answer is to follow.

    Raises:
        InputError: no chat template, or no token at all.
    """
    if chat and not tokenizer.chat_template:
        raise InputError(message("--chat", "the model's tokenizer has no chat template", "leave --chat out"))
    if chat:
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(cast(str, text), add_special_tokens=False).input_ids
    else:
        ids = tokenizer(prompt).input_ids
    if not ids:
        raise InputError(message("--prompt", "it has no tokens", "give some text"))
    return torch.tensor(ids, dtype=torch.int64)


def check_length(model: PreTrainedModel, length: int) -> None:
    """The model has a position for every token.

    Raises:
        InputError: it has not.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and length > limit:
        what = f"prompt and new tokens are {length}, more than the model's {limit} positions"
        raise InputError(message("--max-new-tokens", what, "ask for fewer, or shorten the prompt"))


def stop_tokens(model: PreTrainedModel) -> frozenset[int]:
    """The tokens that end a text, from the model's generation config."""
    config = model.generation_config
    found = None if config is None else config.eos_token_id
    return frozenset([found] if isinstance(found, int) else found or ())


def _forward(model: PreTrainedModel, cache: Any) -> Callable[[Tensor], Tensor]:
    """From ids [1, tokens] that continue the cache's text to logits [1, 1, vocabulary].

    Its code object is its own: torch.compile keeps what it made by code objects, see :func:`_about_tokens`.
    """

    def forward(ids: Tensor) -> Tensor:
        return cast(Tensor, model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits)

    return FunctionType(forward.__code__.replace(), globals(), forward.__name__, None, forward.__closure__)


def _compiled(step: Callable[[Tensor], Tensor], backend: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """As one graph; on a CPU Inductor's code around its kernels is C++, which calls operators without Python.

    That code is compiled apart from the kernels, with little optimization, which it does not need: in half of the time.
    It rounds where the eager step rounds: what it fuses would else stay in float32, and other tokens be chosen.
    """
    options: dict[str, Any] = {"guard_filter_fn": _about_tokens}
    if backend == "inductor" and device.type == "cpu":
        options |= {"cpp_wrapper": True, "cpp_wrapper_build_separate": True, "emulate_precision_casts": True}
        options["aot_inductor.custom_ops_to_c_shims"] = c_functions()
    return torch.compile(step, fullgraph=True, dynamic=False, backend=backend, options=options)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's search for cycles, which takes a quarter of the time that torch.compile needs."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _about_tokens(guards: Sequence[Any]) -> list[bool]:
    """Which of torch.compile's conditions are looked at in every step: those on the tokens and on torch's own state.

    The others, some thousands on the model's modules and on the cache, took a quarter of a step's time. They hold for
    every call of a step, since the function has one model and one cache.
    """
    return [guard.name in ("", "ids", "L['ids']") for guard in guards]


def _static_cache(model: PreTrainedModel, length: int) -> Any:
    """A cache whose layers all have room for ``length`` tokens.

    transformers' own for sliding windows is as short as the window, counts its tokens in Python, and so is compiled
    again at every step; in a long one the masks, which know the window, leave the same keys.
    """
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    if not getattr(model, "_can_compile_fullgraph", True):
        kind = model.config.model_type
        raise InputError(
            message(kind, "transformers has no static cache for this architecture", "use transformers' own generate()")
        )
    cache = StaticCache(config=model.config, max_cache_len=length)
    cache.layers = [
        StaticLayer(max_cache_len=length) if type(layer) is StaticSlidingWindowLayer else layer
        for layer in cache.layers
    ]
    return cache
