"""The load-testing harness behind `baton bench`: traffic, measurement and reports.

It speaks to a server only through the public HTTP API, so any OpenAI-compatible server can
be measured. Never imports a server room, nor torch.

config -> run: workload (what), schedule (when) -> client -> answer over sse -> record ->
statistics -> result, with metadata -> report (for people), result_file (for programs); compare lays
two files beside each other
interrupt: a run that Ctrl-C ends early
"""
