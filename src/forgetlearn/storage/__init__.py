"""Atomic writes, hashes, locks, typed records, and the run folder."""
