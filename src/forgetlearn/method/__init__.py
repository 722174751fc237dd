"""Forget, then learn: the method itself and what it is compared with."""
