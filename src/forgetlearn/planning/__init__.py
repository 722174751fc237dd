"""Say what an update will take before it starts: memory, steps, time, disk."""
