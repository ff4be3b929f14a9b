"""Sampling completions and laying them out for training.

Legend of shapes: `batch` rows of a padded micro-batch, `length` its padded width, `tokens` loss tokens (completion
tokens of all rows, flat, in row order), `vocab`, `topk`, `problems`, `group`. Every per-token tensor is aligned with
`targets`: entry t belongs to completion token t given everything before it. There is no other alignment.
"""
