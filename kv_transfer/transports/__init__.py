"""How bytes get from one node to another: tagged messages between two endpoints.

what one must do   base; closes_once: its end; choice: which one a node opens
by plain TCP       tcp over tcp_threads; tcp_options; piece_batches: what one call moves
by UCX             ucx over ucx_endpoint and ucx_progress; ucx_lanes: by what UCX goes
in one process     loopback, for tests
beside them        local_messages, between processes of one machine
"""
