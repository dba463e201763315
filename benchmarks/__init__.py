"""The benchmark suite: ``python -m benchmarks``. See README.md beside this file for the method."""
