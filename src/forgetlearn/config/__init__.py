"""Every setting: described once, read from YAML and flags, checked."""
