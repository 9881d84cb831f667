"""Benchmarks: datasets as their authors distribute them become lists and ground truth; known results are repeated."""
