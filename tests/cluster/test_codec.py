from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import codec, delta_codec
from cluster.errors import (
    InternalError,
    InvalidRequest,
    Overloaded,
    ServingError,
    TransferError,
    TransferFailed,
    error_classes,
)
from cluster.node import Incarnation, NodeId, NodeInfo, NodeLoad, NodeName, NodeRole, NodeState
from cluster.proto import node_pb2 as pb
from cluster.request import (
    FinishReason,
    Handoff,
    KVLoadFailurePolicy,
    PrefixHolder,
    SamplingParams,
    SequenceRequest,
    TokenDelta,
    TokenLogprobs,
)

token_ids = st.lists(st.integers(0, 2**31 - 1), max_size=8).map(tuple)
unit = st.floats(0.0, 1.0, exclude_min=True)
samplings = st.builds(
    SamplingParams,
    max_tokens=st.integers(5, 2**31 - 1),
    seed=st.integers(0, 2**63 - 1),
    min_tokens=st.integers(0, 5),
    temperature=st.floats(0.0, 100.0),
    top_p=unit,
    top_k=st.integers(0, 2**31 - 1),
    min_p=st.floats(0.0, 1.0),
    repetition_penalty=st.floats(0.01, 100.0),
    presence_penalty=st.floats(-2.0, 2.0),
    frequency_penalty=st.floats(-2.0, 2.0),
    logit_bias=st.lists(st.tuples(st.integers(0, 9), st.floats(-100.0, 100.0))).map(tuple),
    num_logprobs=st.none() | st.integers(0, 20),
    stop_token_ids=token_ids,
    ignore_eos=st.booleans(),
)
requests = st.builds(
    SequenceRequest,
    sequence_id=st.text("abc-1", min_size=1),
    request_id=st.text("abc-1", min_size=1),
    prompt_token_ids=token_ids.filter(bool),
    sampling=samplings,
    cache_salt=st.binary(max_size=32),
    deadline_seconds=st.none() | st.floats(0.001, 1e6),
    priority=st.integers(-(2**31), 2**31 - 1),
)


def request(**changes: object) -> pb.Sequence:
    message = codec.encode_sequence(
        SequenceRequest(
            sequence_id="s",
            request_id="r",
            prompt_token_ids=(1, 2),
            sampling=SamplingParams(max_tokens=4, seed=1),
        )
    )
    for name, value in changes.items():
        if isinstance(value, list):
            del getattr(message, name)[:]
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    return message


@given(requests)
def test_sequences_survive_the_wire(sequence: SequenceRequest) -> None:
    wire = codec.encode_sequence(sequence).SerializeToString()
    assert codec.decode_sequence(pb.Sequence.FromString(wire)) == sequence


def test_an_expired_deadline_is_not_mistaken_for_none() -> None:
    message = request(deadline_seconds=0.0)
    assert codec.decode_sequence(message).deadline_seconds is None
    expired = SequenceRequest(
        sequence_id="s",
        request_id="r",
        prompt_token_ids=(1,),
        sampling=SamplingParams(max_tokens=1, seed=0),
        deadline_seconds=-3.0,
    )
    left = codec.decode_sequence(codec.encode_sequence(expired)).deadline_seconds
    assert left is not None
    assert 0 < left < 0.001


@pytest.mark.parametrize(
    "changes",
    [
        {"sequence_id": ""},
        {"request_id": "x" * 257},
        {"request_id": "a\nb"},
        {"prompt_token_ids": []},
        {"prompt_token_ids": [2**31]},
        {"cache_salt": b"x" * 257},
        {"deadline_seconds": math.nan},
        {"deadline_seconds": math.inf},
        {"deadline_seconds": -1.0},
    ],
)
def test_a_lying_sequence_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        codec.decode_sequence(request(**changes))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", math.nan),
        ("temperature", -1.0),
        ("max_tokens", 0),
        ("seed", 2**63),
        ("top_p", 0.0),
        ("num_logprobs", 21),
        ("top_k", 2**31),
    ],
)
def test_lying_sampling_is_refused_naming_the_field(name: str, value: float) -> None:
    message = request()
    setattr(message.sampling, name, value)
    with pytest.raises(InvalidRequest):
        codec.decode_sequence(message)


def test_out_of_range_ids_inside_sampling_are_refused() -> None:
    message = request()
    message.sampling.stop_token_ids.append(2**31)
    with pytest.raises(InvalidRequest, match="stop_token_ids"):
        codec.decode_sequence(message)
    message = request()
    message.sampling.logit_bias.add(token_id=2**31, bias=1.0)
    with pytest.raises(InvalidRequest, match="logit_bias"):
        codec.decode_sequence(message)


@pytest.mark.parametrize(
    "delta",
    [
        TokenDelta(sequence_id="s"),
        TokenDelta(sequence_id="s", token_ids=(1, 2), finish_reason=FinishReason.LENGTH),
        TokenDelta(
            sequence_id="s",
            token_ids=(7,),
            finish_reason=FinishReason.STOP,
            stop_token_id=0,
            num_cached_tokens=0,
            logprobs=(TokenLogprobs(-0.5, ((7, -0.5), (8, -2.0))),),
        ),
        TokenDelta(sequence_id="s", handed_off=True),
        TokenDelta(sequence_id="s", started=True, finish_reason=FinishReason.ABORT),
    ],
)
def test_deltas_survive_the_wire(delta: TokenDelta) -> None:
    wire = delta_codec.encode_delta(delta).SerializeToString()
    assert delta_codec.decode_delta(pb.TokenDelta.FromString(wire)) == delta


def test_a_lying_delta_is_refused() -> None:
    error = pb.Error(code="internal", message="m")
    uneven = pb.TokenLogprobs(logprob=-1.0, top_ids=[1])
    number = pb.TokenLogprobs(logprob=math.nan)
    for message in (
        pb.TokenDelta(),
        pb.TokenDelta(sequence_id="s", finish_reason=9),  # type: ignore[arg-type]
        pb.TokenDelta(sequence_id="s", finish_reason=pb.STOP, error=error),
        pb.TokenDelta(sequence_id="s", token_ids=[1], logprobs=[uneven]),
        pb.TokenDelta(sequence_id="s", token_ids=[1], logprobs=[number]),
        pb.TokenDelta(sequence_id="s", token_ids=[1, 2], logprobs=[pb.TokenLogprobs()]),
        pb.TokenDelta(sequence_id="s", token_ids=[2**31]),
    ):
        with pytest.raises(InvalidRequest):
            delta_codec.decode_delta(message)


# Rooms may add errors of their own that never cross the wire.
OF_THE_TREE = [
    cls for cls in error_classes() if cls is not ServingError and cls.__module__ == "cluster.errors"
]


@pytest.mark.parametrize("cls", OF_THE_TREE)
def test_every_error_keeps_its_code_and_details(cls: type[ServingError]) -> None:
    error = cls("message", param="p", reason="r", retry_after_seconds=2.5)
    back = delta_codec.decode_error(delta_codec.encode_error(error))
    assert isinstance(error, type(back))
    assert back.code == error.code
    assert back.retryable == error.retryable
    assert (back.message, back.param, back.reason) == ("message", "p", "r")
    assert back.retry_after_seconds == 2.5


def test_classes_that_share_a_code_come_back_as_their_parent() -> None:
    assert (
        type(delta_codec.decode_error(delta_codec.encode_error(TransferFailed("m"))))
        is TransferError
    )
    assert type(delta_codec.decode_error(pb.Error(code="overloaded"))) is Overloaded
    assert type(delta_codec.decode_error(pb.Error(code="internal"))) is InternalError


def test_an_unknown_error_code_is_an_internal_error() -> None:
    error = delta_codec.decode_error(pb.Error(code="from-the-future", retry_after_seconds=math.nan))
    assert type(error) is InternalError
    assert error.message
    assert error.retry_after_seconds is None


def test_an_error_inside_a_delta_is_typed() -> None:
    delta = TokenDelta(sequence_id="s", error=Overloaded("Busy.", retry_after_seconds=1.0))
    error = delta_codec.decode_delta(delta_codec.encode_delta(delta)).error
    assert isinstance(error, Overloaded)
    assert error.message == "Busy."


HANDOFF = Handoff(
    transfer_id=bytes(range(16)),
    attempt=2,
    decode=NodeId(NodeName("d"), Incarnation(5)),
    decode_address="127.0.0.1:9",
    gateway_id="g",
    kv_load_failure_policy=KVLoadFailurePolicy.RECOMPUTE,
)


def test_a_handoff_survives_the_wire_and_a_lying_one_is_refused() -> None:
    assert codec.decode_handoff(codec.encode_handoff(HANDOFF)) == HANDOFF
    holder = PrefixHolder(NodeId(NodeName("d1"), Incarnation(7)), "10.0.0.2:9100", 4096, 96)
    held = replace(HANDOFF, holder=holder)
    assert codec.decode_handoff(codec.encode_handoff(held)) == held
    for name, value in (
        ("transfer_id", b"short"),
        ("decode_incarnation", 0),
        ("decode_incarnation", 2**63),
        ("decode_name", ""),
        ("gateway_id", ""),
        ("decode_address", ""),
        ("kv_load_failure_policy", "hope"),
    ):
        message = codec.encode_handoff(HANDOFF)
        setattr(message, name, value)
        with pytest.raises(InvalidRequest):
            codec.decode_handoff(message)


INFO = NodeInfo(
    id=NodeId(NodeName("p0"), Incarnation(7)),
    role=NodeRole.PREFILL,
    state=NodeState.READY,
    grpc_address="127.0.0.1:1",
    metrics_address="127.0.0.1:2",
    model_name="m",
    compatibility_hash="abc",
    block_size=16,
    max_model_len=4096,
    transports=("shm",),
    load=NodeLoad(num_running=3, num_blocks=10, num_free_blocks=4, queued_tokens=2**40),
)


def test_a_description_survives_the_wire_and_a_lying_one_is_refused() -> None:
    def decode(message: pb.NodeDescription) -> NodeInfo:
        return codec.decode_description(
            message, grpc_address="127.0.0.1:1", metrics_address="127.0.0.1:2"
        )

    assert decode(codec.encode_description(INFO, version="1")) == INFO
    for name, value in (
        ("role", "boss"),
        ("state", ""),
        ("block_size", 0),
        ("protocol_version", codec.PROTOCOL_VERSION + 1),
        ("compatibility_hash", ""),
    ):
        message = codec.encode_description(INFO, version="1")
        setattr(message, name, value)
        with pytest.raises(InvalidRequest):
            decode(message)


def test_an_impossible_load_is_refused() -> None:
    assert codec.decode_load(codec.encode_load(INFO.load)) == INFO.load
    with pytest.raises(InvalidRequest):
        codec.decode_load(pb.NodeLoad(num_blocks=1, num_free_blocks=2))
