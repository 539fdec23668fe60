"""The HTTP edge: from a client's JSON to tokens of two nodes, and back. Where to look:

a request    http_server (unread_body) -> edge (id, key) -> app -> routes/ -> body ->
             schemas (types) -> validation by request_rules, chat_messages, chat_template (which
             takes earlier_thoughts as it likes), budget -> request; gateway.begin. lost_clients:
             who does not wait for the answer
its way      admission -> prefix_lookup -> router (a pure choice, by policy) -> dispatch; pairs by
             pair_breaker (pure): between which nodes do hand-offs fail?
a sequence   sequence_machine (pure; says sequence_instructions) inside dispatch; active, attempts:
             what is in flight; retries: whether it is tried again; request_book: how it ended
nodes        nodes (known) -> node_client (a session each, by node_frames; node_calls beside it);
             pulse_watch, by pulse (pure) and http2_pings: silent? departure (pure): does it leave
             in order?
the answer   generation of choices (detokenizer, stop_strings, thoughts, tools/; markers) ->
             streaming, as frames; or whole_answers, of a held_answer; in turns. As answers and
             logprob_answers have it, or dialects/: other APIs; http_errors
text         tokenizer; template_files: chat templates as they lie in a model folder
the process  config -> assembly -> server
for others   measures -> metrics; admin/ (the API of operators)
"""
