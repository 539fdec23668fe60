"""From the JSON a client sent to a `Request` that cannot be wrong.

1. Fields are checked against each other and the model: counts, stop strings, token ids.
2. The prompt becomes token ids: by the chat template, by the tokenizer, or as given.
3. What may still be generated follows from the context length; what does not fit is refused.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from cluster.errors import InvalidRequest, Unsupported
from cluster.request import MAX_LOGPROBS, MAX_SEED, KVLoadFailurePolicy, SamplingParams
from gateway.budget import Budget, Held
from gateway.chat_messages import num_chars, plain_messages, template_variables
from gateway.dialects.messages_errors import overflow
from gateway.request import Prompt, Request, Route
from gateway.request_rules import (
    chat_logprobs,
    check_num_sequences,
    checked_n,
    checked_priority,
    checked_salt,
    completion_logprobs,
    prompts_of,
    stream_rules,
    text_rules,
)
from gateway.tools.bodies import offered_tools

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gateway.chat_template import ChatTemplate
    from gateway.schemas import ChatBody, CompletionBody, GenerationBody, TokenizeBody
    from gateway.thoughts import ThoughtMarks
    from gateway.tokenizer import Tokenizer
    from gateway.tools.formats import ToolFormat

DEFAULT_COMPLETION_TOKENS = 16
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIASES = 1024
# Passed on as they are: `SamplingParams` checks their ranges.
_PLAIN_OPTIONS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
    "ignore_eos",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is known of a request besides its body, and what of that its answer repeats.
    `max_model_len` is that of the cluster."""

    request_id: str
    created: int
    model: str
    max_model_len: int
    deadline_seconds: float | None = None
    kv_load_failure_policy: KVLoadFailurePolicy | None = None
    cache_owner: bytes = b""  # whose requests share what is cached; empty: everybody's do
    repeated: Mapping[str, Any] = field(default_factory=dict)


class Validator:
    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate | None, *, max_whole_logprobs: int
    ) -> None:
        """`max_whole_logprobs`: as the gateway's options have it."""
        self._max_whole_logprobs = max_whole_logprobs
        self._tokenizer = tokenizer
        self._template = template

    async def completion(self, body: CompletionBody, asked: Asked) -> Request:
        n = checked_n(body.n)
        if body.best_of is not None and body.best_of != n:
            raise Unsupported("best_of must equal n.", param="best_of")
        if body.echo and body.logprobs is not None:
            raise Unsupported("echo with logprobs is not supported.", param="echo")
        given = prompts_of(body.prompt)
        check_num_sequences(len(given), n)
        shape = _Shape(
            route=Route.COMPLETIONS,
            prompts=tuple([await self._prompt(one, body) for one in given]),
            n=n,
            budget=Budget(
                asked.max_model_len, "prompt", body.max_tokens, DEFAULT_COMPLETION_TOKENS
            ),
            num_logprobs=completion_logprobs(body),
            echo=bool(body.echo),
        )
        return self._request(body, asked, shape)

    async def chat(self, body: ChatBody, asked: Asked, route: Route = Route.CHAT) -> Request:
        """`route`: the API that the chat was written for."""
        n = checked_n(body.n)
        budget = Budget(asked.max_model_len, "messages", body.max_tokens)
        if body.max_completion_tokens is not None:
            field = "max_completion_tokens"
            budget = replace(budget, asked=body.max_completion_tokens, field=field)
        if route is Route.RESPONSES:
            budget = replace(budget, unit="input", field="max_output_tokens")
        if route is Route.MESSAGES:
            budget = replace(budget, overflow=overflow)
        tools = self._tools(body)
        prompt = await self._chat_prompt(body, tools)
        token_ids = await self._encode_chat(prompt, body)
        shape = _Shape(
            route=route,
            prompts=(Prompt(token_ids=token_ids),),
            n=n,
            budget=budget,
            num_logprobs=chat_logprobs(body),
            echo=False,
            tool_format=self._tool_format("tools") if tools else None,
            thought_marks=None if self._template is None else self._template.thought_marks,
            prompt=prompt,
        )
        return self._request(body, asked, shape)

    async def chat_token_ids(self, body: ChatBody | TokenizeBody) -> tuple[int, ...]:
        return await self._encode_chat(await self._chat_prompt(body, self._tools(body)), body)

    async def _encode_chat(self, text: str, body: ChatBody | TokenizeBody) -> tuple[int, ...]:
        """The template wrote the special tokens, so the tokenizer adds none unless asked to."""
        return await self._tokenizer.encode(text, add_special_tokens=bool(body.add_special_tokens))

    def _tools(self, body: ChatBody | TokenizeBody) -> list[dict[str, Any]]:
        """Those that the template tells the model of."""
        tools = offered_tools(body.tools, body.tool_choice)
        if tools:
            self._tool_format("tools")
        return tools

    def _tool_format(self, param: str) -> ToolFormat:
        form = None if self._template is None else self._template.tool_format
        if form is None:
            raise Unsupported(
                "This model's chat template takes no tools, or in a form that is not known here.",
                param=param,
            )
        return form

    async def _chat_prompt(self, body: ChatBody | TokenizeBody, tools: list[dict[str, Any]]) -> str:
        messages = plain_messages(body.messages or [])
        if self._template is None:
            raise Unsupported("This model has no chat template; use /v1/completions.")
        for index, message in enumerate(messages):
            if message["role"] == "tool" or "tool_calls" in message:
                self._tool_format(f"messages[{index}]")
        continues = bool(body.continue_final_message)
        adds = body.add_generation_prompt
        render = partial(
            self._template.render,
            messages,
            add_generation_prompt=(not continues) if adds is None else adds,
            continue_final_message=continues,
            variables=template_variables(body),
            tools=tools,
        )
        return await self._tokenizer.run(render, num_chars(messages, tools))

    async def _prompt(self, given: str | list[int], body: CompletionBody) -> Prompt:
        if isinstance(given, str):
            adds = body.add_special_tokens is not False
            token_ids = await self._tokenizer.encode(given, add_special_tokens=adds)
            if not given or not token_ids:
                raise InvalidRequest("The prompt is empty.", param="prompt")
            return Prompt(token_ids=token_ids, text=given if body.echo else None)
        self.check_token_ids(given, "prompt")
        decode = partial(self._tokenizer.decode, given)
        text = await self._tokenizer.run(decode, len(given)) if body.echo else None
        return Prompt(token_ids=tuple(given), text=text)

    def check_token_ids(self, token_ids: Sequence[int], param: str) -> None:
        vocab_size = self._tokenizer.vocab_size
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
            raise InvalidRequest(
                f"{param} holds a token id that is not in [0, {vocab_size}).", param=param
            )

    def _request(self, body: GenerationBody, asked: Asked, shape: _Shape) -> Request:
        if body.response_format is not None and body.response_format.type != "text":
            raise Unsupported("Only response_format text is supported.", param="response_format")
        return Request(
            route=shape.route,
            request_id=asked.request_id,
            model=asked.model,
            created=asked.created,
            prompts=shape.prompts,
            sampling=self._sampling(body, self._bounded(body, shape)),
            n=shape.n,
            text=text_rules(
                body,
                shape.tool_format,
                shape.thought_marks,
                shape.prompt,
                self._tokenizer.is_special,
            ),
            stream=stream_rules(body),
            echo=shape.echo,
            return_token_ids=bool(body.return_token_ids),
            cache_salt=asked.cache_owner + checked_salt(body.cache_salt),
            priority=checked_priority(body.priority),
            deadline_seconds=asked.deadline_seconds,
            kv_load_failure_policy=asked.kv_load_failure_policy,
            repeated=asked.repeated,
        )

    def _bounded(self, body: GenerationBody, shape: _Shape) -> _Shape:
        """What is not streamed is held until all of it is there."""
        num_logprobs = shape.num_logprobs
        if num_logprobs is None or body.stream or not 0 <= num_logprobs <= MAX_LOGPROBS:
            return shape
        per_token = len(shape.prompts) * shape.n * (1 + num_logprobs)
        held = Held(self._max_whole_logprobs, per_token)
        return replace(shape, budget=replace(shape.budget, held=held))

    def _sampling(self, body: GenerationBody, shape: _Shape) -> tuple[SamplingParams, ...]:
        seed = random.getrandbits(63) if body.seed is None else body.seed % MAX_SEED
        options = self._sampling_options(body)
        return tuple(
            SamplingParams(
                max_tokens=shape.budget.max_tokens(len(prompt.token_ids)),
                seed=seed,
                num_logprobs=shape.num_logprobs,
                **options,
            )
            for prompt in shape.prompts
        )

    def _sampling_options(self, body: GenerationBody) -> dict[str, Any]:
        """The fields that the client set; the others keep the defaults of `SamplingParams`."""
        options = {
            name: getattr(body, name) for name in _PLAIN_OPTIONS if getattr(body, name) is not None
        }
        if body.top_k is not None:
            options["top_k"] = 0 if body.top_k == -1 else body.top_k  # -1: off, as in vLLM
        if body.stop_token_ids:
            if len(body.stop_token_ids) > MAX_STOP_TOKEN_IDS:
                raise InvalidRequest("Too many stop_token_ids.", param="stop_token_ids")
            self.check_token_ids(body.stop_token_ids, "stop_token_ids")
            options["stop_token_ids"] = tuple(body.stop_token_ids)
        if body.logit_bias:
            options["logit_bias"] = self._logit_bias(body.logit_bias)
        return options

    def _logit_bias(self, biases: dict[str, float]) -> tuple[tuple[int, float], ...]:
        if len(biases) > MAX_LOGIT_BIASES:
            raise InvalidRequest("Too many entries in logit_bias.", param="logit_bias")
        if not all(key.isascii() and key.isdecimal() and len(key) < 10 for key in biases):
            raise InvalidRequest("The keys of logit_bias must be token ids.", param="logit_bias")
        pairs = tuple((int(key), bias) for key, bias in biases.items())
        self.check_token_ids([token_id for token_id, _ in pairs], "logit_bias")
        return pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """Where the two routes differ, once their prompts are token ids."""

    route: Route
    prompts: tuple[Prompt, ...]
    n: int
    budget: Budget
    num_logprobs: int | None
    echo: bool
    tool_format: ToolFormat | None = None
    thought_marks: ThoughtMarks | None = None
    prompt: str = ""  # of a chat
