"""Namespace machines on one computer, for demonstrations, tests and benchmarks."""
