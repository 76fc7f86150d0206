"""Calibration samples: packing, truncating, the draw, the hash, and every shortfall said out loud."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Callable, Iterable
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from quantkit import calibration
from quantkit.calibration import CalibrationSet, CalibrationSpec, chat_template_of, from_tokens
from quantkit.errors import CalibrationError
from quantkit.text import open_source

BOS = 1
WORDS = 6000
TEMPLATE = "{{ bos_token }}{% for turn in messages %} {{ turn.content }}{% endfor %}"
REFUSING = "{{ raise_exception('roles must alternate') }}"


def make_tokenizer(*, bos: bool = False, template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of words: w0, w1, ... have the ids 3, 4, ..., so that ids tell where they came from."""
    vocabulary = {"<unk>": 0, "<s>": BOS, "</s>": 2} | {f"w{number}": number + 3 for number in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        single = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
        tokenizer.post_processor = single
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=8
    )
    fast.chat_template = template
    return fast


PLAIN = make_tokenizer()
WITH_BOS = make_tokenizer(bos=True)


def words(start: int, count: int) -> str:
    return " ".join(f"w{number}" for number in range(start, start + count))


def write(path: Path, documents: Iterable[str]) -> str:
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return str(path)


def consecutive(path: Path, lengths: Iterable[int]) -> str:
    """Documents of these many tokens, no word twice."""
    documents, start = [], 0
    for length in lengths:
        documents.append(words(start, length))
        start += length
    return write(path, documents)


def draw(
    source: str,
    num_samples: int,
    sequence_length: int,
    *,
    packing: Literal["pack", "truncate"] = "pack",
    seed: int = 0,
    tokenizer: PreTrainedTokenizerFast = PLAIN,
    vocab_size: int | None = WORDS + 3,
) -> CalibrationSet:
    spec = CalibrationSpec(source, num_samples, sequence_length, packing, seed)
    return calibration.calibration_samples(spec, tokenizer, vocab_size=vocab_size)


def ids(result: CalibrationSet) -> list[list[int]]:
    return [sample.tolist() for sample in result.samples]


def error_of(action: Callable[[], object]) -> str:
    with pytest.raises(CalibrationError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text
    return text


# pack


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    sequence_length=st.integers(2, 17),
    seed=st.integers(0, 2**40),
    data=st.data(),
)
def test_samples_are_pieces_of_the_packed_stream_and_no_token_is_used_twice(
    tmp_path: Path, lengths: list[int], sequence_length: int, seed: int, data: st.DataObject
) -> None:
    source = consecutive(tmp_path / "a.jsonl", lengths)
    windows = sum(lengths) // sequence_length
    if not windows:
        return
    num_samples = data.draw(st.integers(1, windows))
    result = draw(source, num_samples, sequence_length, seed=seed)
    assert [len(sample) for sample in result.samples] == [sequence_length] * num_samples
    flat = [token for sample in ids(result) for token in sample]
    assert len(set(flat)) == len(flat) == result.num_tokens
    starts = {3 + sum(lengths[:index]) for index in range(len(lengths))}
    ends = {start + length for start, length in zip(sorted(starts), lengths, strict=True)}
    for sample in ids(result):
        for before, after in pairwise(sample):
            assert after == before + 1 or (before + 1 in ends and after in starts)


def test_all_windows_together_are_the_whole_stream(tmp_path: Path) -> None:
    source = consecutive(tmp_path / "a.jsonl", [10] * 12)
    result = draw(source, 12, 10)
    assert sorted(token for sample in ids(result) for token in sample) == list(range(3, 123))


def test_windows_are_drawn_from_more_text_than_is_asked_for(tmp_path: Path) -> None:
    source = consecutive(tmp_path / "a.jsonl", [1000])
    starts = {sample[0] for seed in range(40) for sample in ids(draw(source, 2, 10, seed=seed))}
    assert all((start - 3) % 10 == 0 for start in starts)
    assert len(starts) > 30  # of 100: not always the head of the stream


def test_only_a_pool_of_windows_is_tokenized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = consecutive(tmp_path / "a.jsonl", [10] * 200)
    encoded: list[str] = []
    encode = calibration._Encoder.encode

    def counted(self: calibration._Encoder, text: str) -> torch.Tensor:
        encoded.append(text)
        return encode(self, text)

    monkeypatch.setattr(calibration._Encoder, "encode", counted)
    draw(source, 3, 10)
    assert len(encoded) == 3 * calibration.WINDOW_POOL


def test_bos_stands_once_before_each_document(tmp_path: Path) -> None:
    source = consecutive(tmp_path / "a.jsonl", [7] * 6)
    result = draw(source, 6, 8, tokenizer=WITH_BOS)
    assert all(sample[0] == BOS and BOS not in sample[1:] for sample in ids(result))
    assert result.notes == ()


@pytest.mark.parametrize(
    ("num_samples", "sequence_length", "said"),
    [
        (38, 10, "370 tokens (all of it), 380 are needed for 38 samples of 10"),
        (38, 10, "--num-samples 37, or --sequence-length 9"),
        (2, 300, "--num-samples 1, or --sequence-length 185"),
        (1, 371, "give more text, or --sequence-length 370"),
        (371, 10, "give more text, or --num-samples 37"),
    ],
)
def test_too_few_tokens_says_what_would_fit(tmp_path: Path, num_samples: int, sequence_length: int, said: str) -> None:
    source = consecutive(tmp_path / "a.jsonl", [37] * 10)
    assert said in error_of(lambda: draw(source, num_samples, sequence_length))
    for proposal in ((37, 10), (38, 9), (1, 300), (2, 185), (1, 370)):
        assert len(draw(source, *proposal).samples) == proposal[0]


@pytest.mark.parametrize("packing", ["pack", "truncate"])
@pytest.mark.parametrize("documents", [[], ["", " \n "]])
def test_no_text_is_an_error(tmp_path: Path, packing: Literal["pack", "truncate"], documents: list[str]) -> None:
    source = write(tmp_path / "a.jsonl", documents)
    assert "there is no text in it" in error_of(lambda: draw(source, 1, 2, packing=packing))


# truncate


def test_truncate_takes_one_document_a_sample_and_never_pads(tmp_path: Path) -> None:
    lengths = [1, 2, 5, 9, 30, 1]
    source = consecutive(tmp_path / "a.jsonl", lengths)
    result = draw(source, 4, 9, packing="truncate")
    assert sorted(map(len, result.samples)) == [2, 5, 9, 9]
    starts = {3 + sum(lengths[:index]) for index in range(len(lengths))}
    for sample in ids(result):
        assert sample[0] in starts
        assert sample == list(range(sample[0], sample[0] + len(sample)))
    assert result.num_tokens == 25


def test_truncate_counts_documents_that_are_too_short(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", ["w1", "w2", "w3 w4"])
    error = error_of(lambda: draw(source, 2, 4, packing="truncate"))
    assert "1 documents of at least 2 tokens (all of it), 2 are needed" in error
    assert "--num-samples 1" in error
    notes = {draw(source, 1, 4, packing="truncate", seed=seed).notes for seed in range(20)}
    assert {(), ("2 documents of fewer than 2 tokens were skipped",)} < notes


def test_truncate_of_a_long_txt_file_is_one_sample(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(words(0, WORDS) * 20)
    result = draw(str(tmp_path), 1, 50, packing="truncate")
    assert ids(result) == [list(range(3, 53))]
    assert "1 documents" in error_of(lambda: draw(str(tmp_path), 2, 50, packing="truncate"))


# the draw


@pytest.mark.parametrize("packing", ["pack", "truncate"])
def test_the_seed_decides_and_global_generators_are_untouched(
    tmp_path: Path, packing: Literal["pack", "truncate"]
) -> None:
    source = consecutive(tmp_path / "a.jsonl", [20] * 30)
    torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()
    first = draw(source, 8, 10, packing=packing, seed=1)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert str(np.random.get_state()) == str(numpy_state)
    again = draw(source, 8, 10, packing=packing, seed=1)
    assert ids(again) == ids(first)
    assert again.sha256 == first.sha256
    assert draw(source, 8, 10, packing=packing, seed=2).sha256 != first.sha256


def test_the_draw_is_the_same_on_every_platform(tmp_path: Path) -> None:
    """Golden: worked out from random.Random(7).random(), which Python keeps."""
    source = consecutive(tmp_path / "a.jsonl", [4] * 5)
    order = random.Random(7)
    order.random()  # the one file's place
    documents = [place for _, place in sorted((order.random(), place) for place in range(5))]
    stream = [3 + 4 * place + offset for place in documents for offset in range(4)]
    drawn = [place for _, place in sorted((order.random(), place) for place in range(4))][:3]
    result = draw(source, 3, 5, seed=7)
    assert ids(result) == [stream[5 * place : 5 * place + 5] for place in drawn]
    assert result.sha256 == "43b6fe1b6b17e93cf3eaf6c4733daa7662fb4aace79907580e07e2415a0c4449"


def test_a_large_source_is_read_from_all_its_files_and_not_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        documents = [words(1000 * number + 10 * index, 10) for index in range(50)]
        with Path(write(tmp_path / f"{number}.jsonl", documents)).open("a") as file:
            # More than the pool is ever asked for, then a line that must not be reached.
            file.write('{"text": "</s>"}\n' * 200 + "broken\n")
    monkeypatch.setattr(calibration, "POOL_CHARACTERS", 3000)
    assert draw(str(tmp_path), 5, 10).num_tokens == 50
    streams = open_source(str(tmp_path), split="calibration").streams
    pool = calibration._read_pool("a", streams, 3000)
    assert {int(document.split()[0][1:]) // 1000 for document in pool.documents} == set(range(5))
    assert 3000 <= sum(map(len, pool.documents)) < 3100


def test_files_are_read_in_turn_a_few_open_at_a_time() -> None:
    opened: list[int] = []

    def stream(number: int) -> Iterable[str]:
        opened.append(number)
        yield from [f"{number}"] * (1 + number % 3)

    streams = [iter(stream(number)) for number in range(100)]
    taken = calibration._in_turn(streams)
    assert [next(taken) for _ in range(32)] == [str(number) for number in range(32)]
    assert opened == list(range(32))
    rest = list(taken)
    assert len(rest) + 32 == sum(1 + number % 3 for number in range(100))


@given(st.text(alphabet="ab\n\r", max_size=120), st.integers(1, 20))
def test_pieces_give_the_document_back(text: str, limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "PIECE_CHARACTERS", limit)
        pieces = list(calibration._pieces(StringIO(text, newline="")))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= 2 * limit for piece in pieces)
    assert all(piece.endswith(("\n", "\r")) or len(piece) == 2 * limit for piece in pieces[:-1])


def test_the_builtin_text_is_enough_for_a_small_model() -> None:
    result = draw("builtin", 4, 64)
    assert (result.source, result.num_tokens) == ("builtin", 256)


# special tokens and the vocabulary


@pytest.mark.parametrize("packing", ["pack", "truncate"])
def test_a_second_bos_is_removed_and_noted(tmp_path: Path, packing: Literal["pack", "truncate"]) -> None:
    path = tmp_path / "a.jsonl"
    turns = [{"role": "user", "content": words(4 * index, 4)} for index in range(3)]
    path.write_text("\n".join(json.dumps({"messages": [turn]}) for turn in turns))
    both = draw(str(path), 3, 5, packing=packing, tokenizer=make_tokenizer(bos=True, template=TEMPLATE))
    assert [sample.count(BOS) for sample in ids(both)] == [1, 1, 1]
    assert both.notes == ("3 documents began with two BOS tokens; one was removed from each",)
    one = draw(str(path), 3, 5, packing=packing, tokenizer=make_tokenizer(template=TEMPLATE))
    assert one.sha256 == both.sha256
    assert one.notes == ()


def test_chats_need_a_template(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "w1 w2"}]}')
    assert "there is no chat template" in error_of(lambda: draw(str(path), 1, 2))
    error = error_of(lambda: draw(str(path), 1, 2, tokenizer=make_tokenizer(template=REFUSING)))
    assert "line 1, column 'messages': the chat template refuses it (roles must alternate)" in error


def test_the_chat_template_as_a_function() -> None:
    assert chat_template_of(PLAIN) is None
    template = chat_template_of(make_tokenizer(template=TEMPLATE))
    assert template is not None
    assert template([{"role": "user", "content": "w1"}]) == "<s> w1"


def test_an_id_outside_of_the_vocabulary_is_the_wrong_tokenizer(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [words(0, 10)])
    assert len(draw(source, 1, 10, vocab_size=13).samples) == 1
    said = "token id 12 is outside of the model's vocabulary of 12; use the model's own tokenizer"
    assert said in error_of(lambda: draw(source, 1, 10, vocab_size=12))
    assert draw(source, 1, 10, vocab_size=None).num_tokens == 10


def test_a_tokenizer_that_truncates_on_its_own_does_not_shorten_documents(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=90)
    source = consecutive(tmp_path / "a.jsonl", [50])
    assert ids(draw(source, 1, 50, tokenizer=tokenizer)) == [list(range(3, 53))]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_samples": 0}, "num_samples=0; give an integer of at least 1"),
        ({"sequence_length": 1}, "sequence_length=1; give an integer of at least 2"),
        ({"seed": -1}, "seed=-1; give an integer of at least 0"),
        ({"num_samples": 2.0}, "num_samples=2.0"),
        ({"num_samples": True}, "num_samples=True"),
        ({"packing": "pad"}, "packing='pad'; give one of pack, truncate"),
    ],
)
def test_a_specification_that_is_not_allowed(options: dict[str, Any], said: str) -> None:
    assert said in error_of(lambda: CalibrationSpec(**options))


# the user's own tokens


def test_from_tokens_accepts_rows_and_batches() -> None:
    batch = torch.tensor([[5, 6, 7], [8, 9, 10]])
    result = from_tokens(
        [torch.tensor([1, 2], dtype=torch.int32), [3, 4], torch.tensor([[1, 3]]), batch], vocab_size=11
    )
    assert ids(result) == [[1, 2], [3, 4], [1, 3], [5, 6, 7], [8, 9, 10]]
    assert all(sample.dtype == torch.int64 for sample in result.samples)
    assert result.num_tokens == 12
    assert ids(from_tokens(batch)) == [[5, 6, 7], [8, 9, 10]]
    batch[0, 0] = 0  # copied, or the hash would no longer be the samples'
    assert ids(result)[3] == [5, 6, 7]


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ([], "tokens: no samples"),
        ([[]], "sample 1: torch.float32 of shape [0]"),
        ([torch.zeros(2, 0, dtype=torch.int64)], "shape [2, 0]"),
        ([torch.tensor([1.0, 2.0])], "sample 1: torch.float32 of shape [2]"),
        ([[1, 2], torch.tensor([True, False])], "sample 2: torch.bool"),
        ([1, 2, 3], "torch.int64 of shape []; give integers of shape [length] or [batch, length]"),
        ([torch.zeros(1, 1, 2, dtype=torch.int64)], "shape [1, 1, 2]"),
        ([[1, -100]], "token id -100"),
        ([[1, 50]], "token id 50 is outside of the model's vocabulary of 50"),
        (["text"], "not a tensor of token ids"),
        ([[[1, 2], [3]]], "not a tensor of token ids"),
        ([[2**70]], "not a tensor of token ids"),
        ([[4, 5], [BOS, BOS, 4]], "sample 2: begins with two BOS tokens (1)"),
    ],
)
def test_tokens_that_cannot_be_used(samples: Any, said: str) -> None:
    assert said in error_of(lambda: from_tokens(samples, vocab_size=50, bos_token_id=BOS))


def test_the_hash_is_over_lengths_and_little_endian_ids() -> None:
    result = from_tokens([[1, 2, 3], [40000]])
    written = struct.pack("<qqqqqq", 3, 1, 2, 3, 1, 40000)
    assert result.sha256 == hashlib.sha256(written).hexdigest()
    assert result.sha256 == "d625760fe924dc4e3d12e8a766485145a29ac1edffcdf6cf94ad33cd3894314f"
    assert from_tokens([[1, 2], [3, 40000]]).sha256 != result.sha256
