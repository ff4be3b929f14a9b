"""Proves on the real models and a handful of problems that a recipe can work: every check of docs/doctor.md."""
