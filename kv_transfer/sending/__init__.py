"""The sending end of hand-offs: `outgoing` holds the rules of one, `sender` carries them out.

of all       sender; sendings: its books; answers: what decode nodes say; prefixes for others
of one       outgoing (pure) says outgoing_instructions; computing: layers that are not there yet
to a node    peer: kv_session (what is said), data_link (what was agreed) and shipping: its frames,
             as payloads; slot_reads: who still reads our slots
"""
