"""Inputs that nobody would write, for every parser: `python -m fuzz`, docs/fuzzing.md."""
