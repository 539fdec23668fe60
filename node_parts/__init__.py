"""What a node of either role is made of. Joins the engine and the KV transfer, which do not know
each other; knows nothing of prompts that are handed off or of sequences that run."""
