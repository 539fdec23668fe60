"""Moves KV from the pool of one node into that of another, by PROTOCOL.md. Where to look:

both ends    agent (one in a process) over a transport, staging, pool, stats; config; rehearsal;
             required_transport
what is said handshake, then protocol: frames (frame_place, digests) and a commit; failures
sending      sending/: outgoing (pure), of a prompt, in sender; sendings: its books; answers: what
             decode nodes say; peer ships; prefixes for others
receiving    receiving/: intake (pure), of all transfers, in receiver; sessions: who is connected;
             errands: what takes time; fates: what the node is told; landings take what arrives
bytes        device_moves (device_lists) and host_moves, between pool and slots; mapped_slots: slots
             of a peer
ownership    lease, quarantine; sweeping: their timer; transfer: names of its states; telling: of
             the node, who owns it
transports   transports/: base (what one must do), tcp, ucx, loopback; choice; small_messages
the device   polling: waiting for it on the event loop
for others   metrics; trace: where a hand-off's time goes; plain_copy, idle: for who measures
"""
