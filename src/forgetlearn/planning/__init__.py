"""Estimate what an update will take before it starts: memory, steps, time and disk space."""
