"""Benchmarks of kvtcp."""
