"""Kernels for CPUs in C++, which XLA calls by name; compiled by the machine's own compiler."""
