"""Arithmetic on weights: checkpoint folders, task vectors, adapters."""
