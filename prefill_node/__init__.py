"""One prefill node. `node` puts it together; `service` has the life of a prompt on the event loop,
`loop` what the engine's thread sees of it; `scheduler` says what a step computes, `layer_groups`
what of it is sent together. Prefixes that others have cached: prefix_fetches, if fetch_estimate
says that it is sooner, over holder_channels, into incoming_prefixes; metrics counts them.
measuring: spare blocks for who asks how fast they come."""
