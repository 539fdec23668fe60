"""Puts a gateway together from its configuration and what it shares with the cluster."""

from __future__ import annotations

import random
import secrets
import time
from typing import TYPE_CHECKING

from gateway.admission import Admission, Limits
from gateway.dispatch import Dispatcher
from gateway.gateway import Gateway
from gateway.measures import Measures
from gateway.metrics import GatewayCollector
from gateway.node_client import NodeClient
from gateway.nodes import Nodes
from gateway.policy import Policy, PolicyHolder
from gateway.prefix_lookup import PrefixLookup
from gateway.request_book import RequestBook
from gateway.sequence_instructions import Patience
from gateway.validation import Validator

if TYPE_CHECKING:
    from collections.abc import Callable

    from prometheus_client import CollectorRegistry

    from cluster.clock import Clock
    from cluster.membership_events import Event
    from cluster.node import NodeInfo
    from gateway.chat_template import ChatTemplate
    from gateway.config import GatewayConfig
    from gateway.prefix_lookup import Index
    from gateway.tokenizer import Tokenizer


def assemble(
    config: GatewayConfig,
    *,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    index: Index,
    observe: Callable[[Event], None],
    registry: CollectorRegistry,
    clock: Clock,
) -> Gateway:
    """`observe` tells membership what this process sees; `registry` gets the metrics.

    Needs a running event loop. Nothing runs yet: `gateway.nodes.apply` connects to nodes.
    """
    measures = Measures()
    dispatcher = _dispatcher(config, measures, observe, clock)
    nodes = dispatcher.nodes
    admission = Admission(_limits(config), chance=random.random)
    registry.register(
        GatewayCollector(
            measures,
            nodes,
            config.model_names[0],
            tokens_queued=lambda: admission.num_queued_tokens,
            retries_left=lambda: dispatcher.num_retries_left,
        )
    )
    return Gateway(
        config,
        tokenizer=tokenizer,
        validator=Validator(tokenizer, template, max_whole_logprobs=config.max_whole_logprobs),
        nodes=nodes,
        dispatcher=dispatcher,
        admission=admission,
        lookup=PrefixLookup(index, nodes, tokenizer.executor),
        policy=PolicyHolder(_first_policy(config)),
        measures=measures,
        book=RequestBook(),
        clock=clock,
        started_at=int(time.time()),
    )


def _first_policy(config: GatewayConfig) -> Policy:
    """What the admin API may change later."""
    return Policy(
        local_prefill_tokens=config.local_prefill_tokens,
        stream_interval=config.stream_interval,
        stream_recovery=config.stream_recovery,
        kv_load_failure_policy=config.kv_load_failure_policy,
    )


def _dispatcher(
    config: GatewayConfig,
    measures: Measures,
    observe: Callable[[Event], None],
    clock: Clock,
) -> Dispatcher:
    """With its nodes, whose clients report to it."""
    gateway_id = f"gateway-{secrets.token_hex(8)}"
    dispatcher = Dispatcher(
        gateway_id,
        patience=Patience(
            first_token=config.first_token_timeout, between_tokens=config.stream_timeout
        ),
        measures=measures,
        clock=clock,
        observe=observe,
    )

    def new_client(node: NodeInfo) -> NodeClient:
        return NodeClient(
            node,
            gateway_id,
            dispatcher,
            clock=clock,
            probe_after=config.probe_after,
            probe_timeout=config.probe_timeout,
            pulse_timeout=config.pulse_timeout,
        )

    names = {config.model.resolve().name, *config.model_names}
    dispatcher.nodes = Nodes(new_client, model_names=frozenset(names))
    return dispatcher


def _limits(config: GatewayConfig) -> Limits:
    return Limits(
        max_num_reqs=config.max_num_reqs,
        max_num_queued_reqs=config.max_num_queued_reqs,
        max_num_queued_tokens=config.max_num_queued_tokens,
    )
