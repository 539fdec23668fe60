"""A choice turns deltas into text, counting what it shows and nothing beyond."""

from __future__ import annotations

from cluster.errors import NodeLost
from cluster.request import FinishReason, TokenDelta
from gateway.choice import Choice
from gateway.request import TextRules
from gateway.tokenizer import Tokenizer
from gateway.tools.formats import HERMES
from tests.gateway.model_folder import byte_level_backend

BACKEND = byte_level_backend()
TOKENIZER = Tokenizer(BACKEND, vocab_size=BACKEND.get_vocab_size())
EOS: int = BACKEND.encode("<eos>", add_special_tokens=False).ids[0]


def ids(text: str) -> tuple[int, ...]:
    found: tuple[int, ...] = tuple(BACKEND.encode(text, add_special_tokens=False).ids)
    return found


def choice(*, keeps_ids: bool = False, **rules: object) -> Choice:
    return Choice(0, TOKENIZER, TextRules(**rules), keeps_ids=keeps_ids)  # type: ignore[arg-type]


def delta(token_ids: tuple[int, ...], **fields: object) -> TokenDelta:
    return TokenDelta(sequence_id="s", token_ids=token_ids, **fields)  # type: ignore[arg-type]


def test_unread_deltas_are_read_at_once() -> None:
    subject = choice()
    for token_id in ids("one two three"):
        subject.deliver(delta((token_id,)))
    assert subject.num_unread_tokens == len(ids("one two three"))
    assert subject.take().text == "one two three"
    assert not subject.has_unread


def test_the_token_that_ended_it_is_counted_and_not_shown() -> None:
    subject = choice(skip_special_tokens=False)
    subject.deliver(delta((*ids("one"), EOS), finish_reason=FinishReason.STOP, stop_token_id=EOS))
    assert subject.take().text == "one"
    assert subject.num_output_tokens == len(ids("one")) + 1
    assert subject.stop_reason is None


def test_a_stop_id_that_the_client_named_is_the_stop_reason() -> None:
    stop = ids(" two")[0]
    subject = choice(stop_token_ids=(stop,))
    subject.deliver(delta((stop,), finish_reason=FinishReason.STOP, stop_token_id=stop))
    assert (subject.take().text, subject.stop_reason) == ("", stop)


def test_nothing_after_a_stop_string_is_counted_even_within_one_delta() -> None:
    subject = choice(stops=(" two",), keeps_ids=True)
    subject.deliver(delta(ids("one two three four")))
    piece = subject.take()
    assert piece.text == "one"
    assert subject.finish_reason is FinishReason.STOP
    assert subject.stop_reason == " two"
    assert subject.num_output_tokens == len(piece.token_ids) == len(ids("one two"))


def test_nothing_after_the_one_call_that_a_client_takes_is_said_or_counted() -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    subject = choice(tool_format=HERMES, one_call=True, keeps_ids=True)
    subject.deliver(delta(ids(call + "two" + call + "three")))
    subject.deliver(delta((), error=NodeLost("x")))
    piece = subject.take()
    assert [each.name for each in piece.calls] == ["f"]
    assert piece.text == ""
    assert subject.finish_reason is FinishReason.STOP
    assert subject.error is None
    assert subject.num_output_tokens == len(piece.token_ids)
    assert TOKENIZER.decode(piece.token_ids) == call


def test_a_character_cut_by_the_end_is_shown_as_replaced() -> None:
    smile = ids("🙂")
    subject = choice()
    subject.deliver(delta(smile[:1], finish_reason=FinishReason.LENGTH))
    assert subject.take().text == ("🙂" if len(smile) == 1 else "\ufffd")


def test_text_held_for_a_stop_string_is_shown_when_it_did_not_come() -> None:
    subject = choice(stops=(" two three",))
    subject.deliver(delta(ids("one two"), finish_reason=FinishReason.LENGTH))
    assert subject.take().text == "one two"
    assert subject.finish_reason is FinishReason.LENGTH


def test_text_before_an_error_is_kept() -> None:
    subject = choice()
    subject.deliver(delta(ids("one")))
    subject.deliver(delta((), error=NodeLost("gone")))
    assert subject.take().text == "one"
    assert isinstance(subject.error, NodeLost)


def test_the_first_node_says_what_was_cached() -> None:
    subject = choice()
    subject.deliver(delta(ids("one")[:1], num_cached_tokens=16))
    subject.deliver(delta(ids(" two")[:1], num_cached_tokens=0))
    subject.take()
    assert subject.num_cached_tokens == 16


def test_what_is_unread_is_taken_in_turns_and_none_of_it_twice() -> None:
    whole, parts = choice(), choice()
    for subject in (whole, parts):
        for token_id in (5, 6, 7, 8):
            subject.deliver(TokenDelta(sequence_id="s", token_ids=(token_id, token_id)))
        subject.deliver(TokenDelta(sequence_id="s", finish_reason=FinishReason.LENGTH))
    text = ""
    unread = []
    while parts.has_unread:
        text += parts.take(3).text
        unread.append(parts.num_unread_tokens)
    assert unread == [4, 0, 0]
    assert text == whole.take().text
    assert parts.num_output_tokens == whole.num_output_tokens == 8
    assert parts.is_finished
