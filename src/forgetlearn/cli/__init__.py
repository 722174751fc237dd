"""The command: parse, check, call, print."""
