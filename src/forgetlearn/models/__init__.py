"""Load, ask, adapt and save causal language models."""
