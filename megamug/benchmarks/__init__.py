"""Benchmarks, one module each, run by `megamug benchmark NAME`; each prints its figures beside its floor."""
