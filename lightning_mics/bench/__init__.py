"""Benchmarks, and the emulated cluster that they run on."""
