"""One decode node. `node` puts it together; `service` has the life of a sequence on the event loop,
`streams` what gateways hear of it, `loop` what the engine's thread sees; `scheduler` says what a
step advances, `reservations` which blocks a hand-off may write, `recompute` how much lost KV may
be computed here. How fast KV comes from elsewhere: measuring, by hand-offs into measured_source."""
