"""Incremental text equals the tokenizer's own decoding of the whole."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.detokenizer import WindowDetokenizer
from gateway.tokenizer import Tokenizer
from tests.gateway.model_folder import byte_level_backend, sentencepiece_backend

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

backends = {"byte_level": cache(byte_level_backend), "sentencepiece": cache(sentencepiece_backend)}
kinds = pytest.mark.parametrize("kind", sorted(backends))


def tokenizer_for(backend: Backend) -> Tokenizer:
    return Tokenizer(backend, vocab_size=backend.get_vocab_size())


def pieces(tokenizer: Tokenizer, ids: list[int], *, skip: bool = True) -> list[str]:
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
    return [*[detokenizer.push([i]) for i in ids], detokenizer.flush()]


@kinds
@pytest.mark.parametrize("skip", [True, False])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_joined_pieces_equal_the_whole_for_any_ids(
    kind: str, skip: bool, data: st.DataObject
) -> None:
    backend = backends[kind]()
    top = backend.get_vocab_size() - 1
    ids = data.draw(st.lists(st.integers(0, top), max_size=30))
    whole = backend.decode(ids, skip_special_tokens=skip)
    assert "".join(pieces(tokenizer_for(backend), ids, skip=skip)) == whole


@kinds
@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40))
def test_joined_pieces_equal_the_whole_for_any_text(kind: str, text: str) -> None:
    backend = backends[kind]()
    ids = backend.encode(text, add_special_tokens=False).ids
    whole = backend.decode(ids, skip_special_tokens=True)
    assert "".join(pieces(tokenizer_for(backend), ids)) == whole


@kinds
@pytest.mark.parametrize("text", ["🙂", "東京", "naïve 🙃 café"])
def test_an_unfinished_character_is_held_back(kind: str, text: str) -> None:
    backend = backends[kind]()
    ids = backend.encode(text, add_special_tokens=False).ids
    assert all("\ufffd" not in piece for piece in pieces(tokenizer_for(backend), ids))


def test_a_character_cut_off_at_the_end_becomes_a_replacement() -> None:
    backend = backends["byte_level"]()
    smile = backend.encode("🙂", add_special_tokens=False).ids
    detokenizer = tokenizer_for(backend).detokenizer(skip_special_tokens=True)
    first = detokenizer.push(smile[:1])
    if len(smile) > 1:
        assert first == ""
        assert detokenizer.flush() == "\ufffd"


@kinds
def test_ascii_words_come_at_once(kind: str) -> None:
    backend = backends[kind]()
    ids = backend.encode("one two three", add_special_tokens=False).ids
    given_pieces = pieces(tokenizer_for(backend), ids)
    assert given_pieces[-1] == ""
    assert all(given_pieces[:-1])


def test_ids_outside_the_vocabulary_leave_no_text() -> None:
    tokenizer = tokenizer_for(backends["byte_level"]())
    assert tokenizer.decode([999_999]) == ""


def test_a_tokenizers_own_truncation_is_switched_off() -> None:
    backend = byte_level_backend()
    backend.enable_truncation(max_length=2)
    tokenizer = tokenizer_for(backend)
    assert len(tokenizer.encode_now("one two three four five six", add_special_tokens=False)) > 2


def test_plain_prompts_get_the_beginning_token_and_templated_ones_do_not() -> None:
    backend = byte_level_backend()
    tokenizer = tokenizer_for(backend)
    bos = backend.token_to_id("<bos>")
    assert tokenizer.encode_now("one", add_special_tokens=True)[0] == bos
    assert bos not in tokenizer.encode_now("one", add_special_tokens=False)


def test_ids_of_the_replacement_itself_are_not_decoded_again_and_again() -> None:
    """A client can ask for nothing else, by a bias, for as long as the model has room."""
    backend = sentencepiece_backend()
    backend.add_tokens(["\ufffd"])
    counting = Counting(backend)
    detokenizer = WindowDetokenizer(cast("Any", counting), ())
    ids = [cast("int", backend.token_to_id("\ufffd"))] * 400
    text = "".join(detokenizer.push([i]) for i in ids)
    assert text + detokenizer.flush() == backend.decode(ids)
    assert counting.num_decoded < 20 * len(ids)


class Counting:
    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.num_decoded = 0

    def decode(self, ids: list[int], **options: Any) -> str:
        self.num_decoded += len(ids)
        return self._backend.decode(ids, **options)

    def id_to_token(self, token_id: int) -> str | None:
        return self._backend.id_to_token(token_id)
