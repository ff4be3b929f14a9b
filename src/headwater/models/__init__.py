"""Causal language models: load, prompt, hidden states."""
