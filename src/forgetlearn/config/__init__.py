"""All settings: described once, read from YAML and flags, and checked."""
