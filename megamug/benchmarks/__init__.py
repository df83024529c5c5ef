"""Benchmarks, one module each, run by `tools/benchmark.py NAME`; each prints its figures beside its floor."""
