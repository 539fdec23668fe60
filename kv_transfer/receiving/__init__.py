"""The receiving end of hand-offs: `intake` holds the rules of all, `receiver` carries them out.

of all       receiver; intake (pure) says intake_instructions; incoming_transfers of incoming, and
             what ends them: overdue, endings
the node     block_source: what is needed of it; errands: what takes time; fates: what it is told
from a node  kv_session -> sessions (succession: who is current) -> receiver_session -> landings of
             arrivals; slot_reader: slots of its sender; silence (pure): a link that brings nothing
when         read_pace (pure) in paced_reads; lookout: awake for what is about to come
for all      tasks
"""
