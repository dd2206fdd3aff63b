"""Benchmarks: every figure of the README, written with its environment to RESULTS.md."""
