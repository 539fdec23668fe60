"""Takes protective lines out, one at a time, and shows that a test misses each."""
