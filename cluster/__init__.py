"""What a process must share to be a member; no torch. Where to look:

words        request, node, errors (the tree), clock, version
on the wire  proto/, by codec and delta_codec; rpc (servers, channels, errors), session_hub (tokens
             to gateways; state_notices, pure: who knows the node's state; sequence_log: how each
             ended), node_service (what every node answers), message_size (what fits)
membership   node_process (start and end of a node, by member_config; last_resort: one that hangs
             there) -> member -> registry; membership (pure; membership_events) in
             membership_watcher: who is there
prefixes     prefix_hash -> prefix_index
Redis        redis_client; node_stores: the two of a node
options      config over options: config_flags, config_sources, config_validation;
             performance_mode, model_folder
seen outside logging, startup, metrics over metric_families, loop_watch; isolation: what one part of
             some work breaks over stays its own
for tests    failpoints
"""
