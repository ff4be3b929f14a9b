"""What runs beside vLLM, in its environment."""
