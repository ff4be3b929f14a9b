"""Grading of untrusted model text: answer extraction, graders, and the killable child processes that run them."""
