"""Headwater: spend scarce labels on the teacher, carry what it learned into the student."""

__version__ = "0.1.0"
