"""Forget, then learn: the method, and the methods that it is compared with."""
