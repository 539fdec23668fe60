from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NOT_FINISHED: _ClassVar[FinishReason]
    STOP: _ClassVar[FinishReason]
    LENGTH: _ClassVar[FinishReason]
    ABORT: _ClassVar[FinishReason]
NOT_FINISHED: FinishReason
STOP: FinishReason
LENGTH: FinishReason
ABORT: FinishReason

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NodeDescription(_message.Message):
    __slots__ = ("name", "incarnation", "role", "state", "model_name", "compatibility_hash", "block_size", "max_model_len", "protocol_version", "version", "transports", "load", "fetches_prefixes", "max_message_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    COMPATIBILITY_HASH_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    FETCHES_PREFIXES_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    incarnation: int
    role: str
    state: str
    model_name: str
    compatibility_hash: str
    block_size: int
    max_model_len: int
    protocol_version: int
    version: str
    transports: _containers.RepeatedScalarFieldContainer[str]
    load: NodeLoad
    fetches_prefixes: bool
    max_message_bytes: int
    def __init__(self, name: _Optional[str] = ..., incarnation: _Optional[int] = ..., role: _Optional[str] = ..., state: _Optional[str] = ..., model_name: _Optional[str] = ..., compatibility_hash: _Optional[str] = ..., block_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., protocol_version: _Optional[int] = ..., version: _Optional[str] = ..., transports: _Optional[_Iterable[str]] = ..., load: _Optional[_Union[NodeLoad, _Mapping]] = ..., fetches_prefixes: _Optional[bool] = ..., max_message_bytes: _Optional[int] = ...) -> None: ...

class NodeLoad(_message.Message):
    __slots__ = ("num_running", "num_waiting", "queued_tokens", "num_blocks", "num_free_blocks", "num_cached_blocks", "num_transfers", "num_quarantined_blocks", "num_gateways")
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    NUM_QUARANTINED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_GATEWAYS_FIELD_NUMBER: _ClassVar[int]
    num_running: int
    num_waiting: int
    queued_tokens: int
    num_blocks: int
    num_free_blocks: int
    num_cached_blocks: int
    num_transfers: int
    num_quarantined_blocks: int
    num_gateways: int
    def __init__(self, num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., num_blocks: _Optional[int] = ..., num_free_blocks: _Optional[int] = ..., num_cached_blocks: _Optional[int] = ..., num_transfers: _Optional[int] = ..., num_quarantined_blocks: _Optional[int] = ..., num_gateways: _Optional[int] = ...) -> None: ...

class ControlRequest(_message.Message):
    __slots__ = ("action",)
    class Action(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        ACTION_UNSPECIFIED: _ClassVar[ControlRequest.Action]
        CORDON: _ClassVar[ControlRequest.Action]
        UNCORDON: _ClassVar[ControlRequest.Action]
        DRAIN: _ClassVar[ControlRequest.Action]
        RESET_PREFIX_CACHE: _ClassVar[ControlRequest.Action]
    ACTION_UNSPECIFIED: ControlRequest.Action
    CORDON: ControlRequest.Action
    UNCORDON: ControlRequest.Action
    DRAIN: ControlRequest.Action
    RESET_PREFIX_CACHE: ControlRequest.Action
    ACTION_FIELD_NUMBER: _ClassVar[int]
    action: ControlRequest.Action
    def __init__(self, action: _Optional[_Union[ControlRequest.Action, str]] = ...) -> None: ...

class ControlReply(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: str
    def __init__(self, state: _Optional[str] = ...) -> None: ...

class InspectRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class InspectReply(_message.Message):
    __slots__ = ("sequences", "leases", "load", "awaited_gateways")
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    AWAITED_GATEWAYS_FIELD_NUMBER: _ClassVar[int]
    sequences: _containers.RepeatedCompositeFieldContainer[SequenceInfo]
    leases: _containers.RepeatedCompositeFieldContainer[LeaseInfo]
    load: NodeLoad
    awaited_gateways: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, sequences: _Optional[_Iterable[_Union[SequenceInfo, _Mapping]]] = ..., leases: _Optional[_Iterable[_Union[LeaseInfo, _Mapping]]] = ..., load: _Optional[_Union[NodeLoad, _Mapping]] = ..., awaited_gateways: _Optional[_Iterable[str]] = ...) -> None: ...

class SequenceInfo(_message.Message):
    __slots__ = ("sequence_id", "request_id", "status", "num_prompt_tokens", "num_output_tokens", "num_blocks", "age_seconds")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    AGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    request_id: str
    status: str
    num_prompt_tokens: int
    num_output_tokens: int
    num_blocks: int
    age_seconds: float
    def __init__(self, sequence_id: _Optional[str] = ..., request_id: _Optional[str] = ..., status: _Optional[str] = ..., num_prompt_tokens: _Optional[int] = ..., num_output_tokens: _Optional[int] = ..., num_blocks: _Optional[int] = ..., age_seconds: _Optional[float] = ...) -> None: ...

class LeaseInfo(_message.Message):
    __slots__ = ("transfer_id", "sequence_id", "peer", "state", "num_blocks", "expires_in_seconds")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    sequence_id: str
    peer: str
    state: str
    num_blocks: int
    expires_in_seconds: float
    def __init__(self, transfer_id: _Optional[bytes] = ..., sequence_id: _Optional[str] = ..., peer: _Optional[str] = ..., state: _Optional[str] = ..., num_blocks: _Optional[int] = ..., expires_in_seconds: _Optional[float] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "message", "param", "reason", "retry_after_seconds")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PARAM_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_SECONDS_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    param: str
    reason: str
    retry_after_seconds: float
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., param: _Optional[str] = ..., reason: _Optional[str] = ..., retry_after_seconds: _Optional[float] = ...) -> None: ...

class GatewayFrame(_message.Message):
    __slots__ = ("hello", "submit", "cancel", "orphaned", "state_answer")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    ORPHANED_FIELD_NUMBER: _ClassVar[int]
    STATE_ANSWER_FIELD_NUMBER: _ClassVar[int]
    hello: GatewayHello
    submit: Submit
    cancel: Cancel
    orphaned: Orphaned
    state_answer: StateAnswer
    def __init__(self, hello: _Optional[_Union[GatewayHello, _Mapping]] = ..., submit: _Optional[_Union[Submit, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., orphaned: _Optional[_Union[Orphaned, _Mapping]] = ..., state_answer: _Optional[_Union[StateAnswer, _Mapping]] = ...) -> None: ...

class GatewayHello(_message.Message):
    __slots__ = ("gateway_id", "protocol_version", "hears_state", "incarnation")
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    HEARS_STATE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    gateway_id: str
    protocol_version: int
    hears_state: bool
    incarnation: int
    def __init__(self, gateway_id: _Optional[str] = ..., protocol_version: _Optional[int] = ..., hears_state: _Optional[bool] = ..., incarnation: _Optional[int] = ...) -> None: ...

class StateAnswer(_message.Message):
    __slots__ = ("number", "is_settled")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    IS_SETTLED_FIELD_NUMBER: _ClassVar[int]
    number: int
    is_settled: bool
    def __init__(self, number: _Optional[int] = ..., is_settled: _Optional[bool] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("sequence", "handoff")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    sequence: Sequence
    handoff: Handoff
    def __init__(self, sequence: _Optional[_Union[Sequence, _Mapping]] = ..., handoff: _Optional[_Union[Handoff, _Mapping]] = ...) -> None: ...

class Sequence(_message.Message):
    __slots__ = ("sequence_id", "request_id", "prompt_token_ids", "sampling", "cache_salt", "deadline_seconds", "priority", "num_emitted_tokens")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    NUM_EMITTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    request_id: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: Sampling
    cache_salt: bytes
    deadline_seconds: float
    priority: int
    num_emitted_tokens: int
    def __init__(self, sequence_id: _Optional[str] = ..., request_id: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., cache_salt: _Optional[bytes] = ..., deadline_seconds: _Optional[float] = ..., priority: _Optional[int] = ..., num_emitted_tokens: _Optional[int] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("max_tokens", "seed", "min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "num_logprobs", "stop_token_ids", "ignore_eos")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    NUM_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    seed: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: _containers.RepeatedCompositeFieldContainer[LogitBias]
    num_logprobs: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    def __init__(self, max_tokens: _Optional[int] = ..., seed: _Optional[int] = ..., min_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., logit_bias: _Optional[_Iterable[_Union[LogitBias, _Mapping]]] = ..., num_logprobs: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ...) -> None: ...

class LogitBias(_message.Message):
    __slots__ = ("token_id", "bias")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    bias: float
    def __init__(self, token_id: _Optional[int] = ..., bias: _Optional[float] = ...) -> None: ...

class Handoff(_message.Message):
    __slots__ = ("transfer_id", "attempt", "decode_name", "decode_incarnation", "decode_address", "gateway_id", "kv_load_failure_policy", "holder")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    DECODE_NAME_FIELD_NUMBER: _ClassVar[int]
    DECODE_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    DECODE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    KV_LOAD_FAILURE_POLICY_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    attempt: int
    decode_name: str
    decode_incarnation: int
    decode_address: str
    gateway_id: str
    kv_load_failure_policy: str
    holder: PrefixHolder
    def __init__(self, transfer_id: _Optional[bytes] = ..., attempt: _Optional[int] = ..., decode_name: _Optional[str] = ..., decode_incarnation: _Optional[int] = ..., decode_address: _Optional[str] = ..., gateway_id: _Optional[str] = ..., kv_load_failure_policy: _Optional[str] = ..., holder: _Optional[_Union[PrefixHolder, _Mapping]] = ...) -> None: ...

class PrefixHolder(_message.Message):
    __slots__ = ("name", "incarnation", "address", "num_tokens", "num_more_tokens")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_MORE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    name: str
    incarnation: int
    address: str
    num_tokens: int
    num_more_tokens: int
    def __init__(self, name: _Optional[str] = ..., incarnation: _Optional[int] = ..., address: _Optional[str] = ..., num_tokens: _Optional[int] = ..., num_more_tokens: _Optional[int] = ...) -> None: ...

class FetchPrefixRequest(_message.Message):
    __slots__ = ("sequence", "handoff", "restore_seconds_per_token")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    RESTORE_SECONDS_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    sequence: Sequence
    handoff: Handoff
    restore_seconds_per_token: float
    def __init__(self, sequence: _Optional[_Union[Sequence, _Mapping]] = ..., handoff: _Optional[_Union[Handoff, _Mapping]] = ..., restore_seconds_per_token: _Optional[float] = ...) -> None: ...

class FetchPrefixReply(_message.Message):
    __slots__ = ("num_tokens",)
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    num_tokens: int
    def __init__(self, num_tokens: _Optional[int] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("sequence_id",)
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    def __init__(self, sequence_id: _Optional[str] = ...) -> None: ...

class Orphaned(_message.Message):
    __slots__ = ("sequence_id",)
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    def __init__(self, sequence_id: _Optional[str] = ...) -> None: ...

class NodeFrame(_message.Message):
    __slots__ = ("welcome", "step", "refused", "state_notice")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    STATE_NOTICE_FIELD_NUMBER: _ClassVar[int]
    welcome: NodeDescription
    step: Step
    refused: Error
    state_notice: StateNotice
    def __init__(self, welcome: _Optional[_Union[NodeDescription, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ..., refused: _Optional[_Union[Error, _Mapping]] = ..., state_notice: _Optional[_Union[StateNotice, _Mapping]] = ...) -> None: ...

class StateNotice(_message.Message):
    __slots__ = ("state", "number")
    STATE_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    state: str
    number: int
    def __init__(self, state: _Optional[str] = ..., number: _Optional[int] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("deltas",)
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    deltas: _containers.RepeatedCompositeFieldContainer[TokenDelta]
    def __init__(self, deltas: _Optional[_Iterable[_Union[TokenDelta, _Mapping]]] = ...) -> None: ...

class TokenDelta(_message.Message):
    __slots__ = ("sequence_id", "token_ids", "logprobs", "finish_reason", "stop_token_id", "num_cached_tokens", "handed_off", "started", "error", "recomputed")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HANDED_OFF_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTED_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    finish_reason: FinishReason
    stop_token_id: int
    num_cached_tokens: int
    handed_off: bool
    started: bool
    error: Error
    recomputed: bool
    def __init__(self, sequence_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., stop_token_id: _Optional[int] = ..., num_cached_tokens: _Optional[int] = ..., handed_off: _Optional[bool] = ..., started: _Optional[bool] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., recomputed: _Optional[bool] = ...) -> None: ...

class TokenLogprobs(_message.Message):
    __slots__ = ("logprob", "top_ids", "top_logprobs")
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    logprob: float
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, logprob: _Optional[float] = ..., top_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class MeasureHandoffRequest(_message.Message):
    __slots__ = ("name", "address")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    name: str
    address: str
    def __init__(self, name: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class MeasureHandoffReply(_message.Message):
    __slots__ = ("transport", "num_bytes", "seconds", "reference", "reference_bytes_per_second", "device", "unit_bytes")
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    UNIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    transport: str
    num_bytes: int
    seconds: float
    reference: str
    reference_bytes_per_second: float
    device: str
    unit_bytes: int
    def __init__(self, transport: _Optional[str] = ..., num_bytes: _Optional[int] = ..., seconds: _Optional[float] = ..., reference: _Optional[str] = ..., reference_bytes_per_second: _Optional[float] = ..., device: _Optional[str] = ..., unit_bytes: _Optional[int] = ...) -> None: ...

class SendScratchRequest(_message.Message):
    __slots__ = ("sequence", "handoff")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    sequence: Sequence
    handoff: Handoff
    def __init__(self, sequence: _Optional[_Union[Sequence, _Mapping]] = ..., handoff: _Optional[_Union[Handoff, _Mapping]] = ...) -> None: ...

class SendScratchReply(_message.Message):
    __slots__ = ("num_tokens",)
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    num_tokens: int
    def __init__(self, num_tokens: _Optional[int] = ...) -> None: ...

class SendPlainRequest(_message.Message):
    __slots__ = ("host", "port", "nonce")
    HOST_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    host: str
    port: int
    nonce: bytes
    def __init__(self, host: _Optional[str] = ..., port: _Optional[int] = ..., nonce: _Optional[bytes] = ...) -> None: ...

class SendPlainReply(_message.Message):
    __slots__ = ("bytes_per_second",)
    BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    bytes_per_second: float
    def __init__(self, bytes_per_second: _Optional[float] = ...) -> None: ...

class SenderFrame(_message.Message):
    __slots__ = ("hello", "reserve", "abort", "abort_ack", "renew")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    ABORT_ACK_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    hello: SenderHello
    reserve: Reserve
    abort: SenderAbort
    abort_ack: AbortAck
    renew: Renew
    def __init__(self, hello: _Optional[_Union[SenderHello, _Mapping]] = ..., reserve: _Optional[_Union[Reserve, _Mapping]] = ..., abort: _Optional[_Union[SenderAbort, _Mapping]] = ..., abort_ack: _Optional[_Union[AbortAck, _Mapping]] = ..., renew: _Optional[_Union[Renew, _Mapping]] = ...) -> None: ...

class SenderHello(_message.Message):
    __slots__ = ("name", "incarnation", "protocol_version", "compatibility_hash", "digest_kinds", "slots", "receiver_incarnation")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    COMPATIBILITY_HASH_FIELD_NUMBER: _ClassVar[int]
    DIGEST_KINDS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    RECEIVER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    name: str
    incarnation: int
    protocol_version: int
    compatibility_hash: str
    digest_kinds: _containers.RepeatedScalarFieldContainer[str]
    slots: bytes
    receiver_incarnation: int
    def __init__(self, name: _Optional[str] = ..., incarnation: _Optional[int] = ..., protocol_version: _Optional[int] = ..., compatibility_hash: _Optional[str] = ..., digest_kinds: _Optional[_Iterable[str]] = ..., slots: _Optional[bytes] = ..., receiver_incarnation: _Optional[int] = ...) -> None: ...

class Reserve(_message.Message):
    __slots__ = ("transfer_id", "attempt", "sequence", "gateway_id", "kv_load_failure_policy")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    KV_LOAD_FAILURE_POLICY_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    attempt: int
    sequence: Sequence
    gateway_id: str
    kv_load_failure_policy: str
    def __init__(self, transfer_id: _Optional[bytes] = ..., attempt: _Optional[int] = ..., sequence: _Optional[_Union[Sequence, _Mapping]] = ..., gateway_id: _Optional[str] = ..., kv_load_failure_policy: _Optional[str] = ...) -> None: ...

class SenderAbort(_message.Message):
    __slots__ = ("transfer_id", "num_frames_posted", "error")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_POSTED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    num_frames_posted: int
    error: Error
    def __init__(self, transfer_id: _Optional[bytes] = ..., num_frames_posted: _Optional[int] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class AbortAck(_message.Message):
    __slots__ = ("transfer_id", "epoch", "num_frames_posted")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_POSTED_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    epoch: int
    num_frames_posted: int
    def __init__(self, transfer_id: _Optional[bytes] = ..., epoch: _Optional[int] = ..., num_frames_posted: _Optional[int] = ...) -> None: ...

class ReceiverFrame(_message.Message):
    __slots__ = ("hello", "refused_hello", "ticket", "refused", "committed", "abort", "renew")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    REFUSED_HELLO_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    hello: ReceiverHello
    refused_hello: Error
    ticket: Ticket
    refused: Refused
    committed: Committed
    abort: ReceiverAbort
    renew: Renew
    def __init__(self, hello: _Optional[_Union[ReceiverHello, _Mapping]] = ..., refused_hello: _Optional[_Union[Error, _Mapping]] = ..., ticket: _Optional[_Union[Ticket, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ..., committed: _Optional[_Union[Committed, _Mapping]] = ..., abort: _Optional[_Union[ReceiverAbort, _Mapping]] = ..., renew: _Optional[_Union[Renew, _Mapping]] = ...) -> None: ...

class ReceiverHello(_message.Message):
    __slots__ = ("name", "incarnation", "data_host", "data_port", "slot_bytes", "session_id", "digest_kind", "messages_at", "max_message_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    DATA_HOST_FIELD_NUMBER: _ClassVar[int]
    DATA_PORT_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    DIGEST_KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_AT_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    incarnation: int
    data_host: str
    data_port: int
    slot_bytes: int
    session_id: int
    digest_kind: str
    messages_at: bytes
    max_message_bytes: int
    def __init__(self, name: _Optional[str] = ..., incarnation: _Optional[int] = ..., data_host: _Optional[str] = ..., data_port: _Optional[int] = ..., slot_bytes: _Optional[int] = ..., session_id: _Optional[int] = ..., digest_kind: _Optional[str] = ..., messages_at: _Optional[bytes] = ..., max_message_bytes: _Optional[int] = ...) -> None: ...

class Ticket(_message.Message):
    __slots__ = ("transfer_id", "incarnation", "epoch", "nonce", "expires_in_seconds", "missing_positions")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MISSING_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    incarnation: int
    epoch: int
    nonce: int
    expires_in_seconds: float
    missing_positions: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, transfer_id: _Optional[bytes] = ..., incarnation: _Optional[int] = ..., epoch: _Optional[int] = ..., nonce: _Optional[int] = ..., expires_in_seconds: _Optional[float] = ..., missing_positions: _Optional[_Iterable[int]] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("transfer_id", "error")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    error: Error
    def __init__(self, transfer_id: _Optional[bytes] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class Committed(_message.Message):
    __slots__ = ("transfer_id", "error")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    error: Error
    def __init__(self, transfer_id: _Optional[bytes] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class ReceiverAbort(_message.Message):
    __slots__ = ("transfer_id", "epoch", "error")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    epoch: int
    error: Error
    def __init__(self, transfer_id: _Optional[bytes] = ..., epoch: _Optional[int] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class Renew(_message.Message):
    __slots__ = ("transfer_id", "extend_seconds", "num_posted")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    EXTEND_SECONDS_FIELD_NUMBER: _ClassVar[int]
    NUM_POSTED_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    extend_seconds: float
    num_posted: int
    def __init__(self, transfer_id: _Optional[bytes] = ..., extend_seconds: _Optional[float] = ..., num_posted: _Optional[int] = ...) -> None: ...
