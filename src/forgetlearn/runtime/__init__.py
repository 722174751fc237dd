"""Work in one process or several: ranks, sharded weights, signals, and patterns that are tried in a child process."""
