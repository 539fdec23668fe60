"""One model over several ranks, a process each. Where to look:

the ranks   crew (rank 0 starts and watches the others), worker (one of these); wire: what they say;
            rendezvous: where they meet while they start, each on its seat; failures
the model   shard: what one rank has of it; sharded: its matrices
a step      ranks: what all do together, and how on CPUs; gpu_ranks, with large_sums of prompts
memory      peer_memory: of one rank, mapped by another
"""
