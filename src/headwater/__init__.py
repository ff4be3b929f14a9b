"""Headwater: spend scarce labels on the teacher, carry what it learned into the student."""

import os

__version__ = "0.1.0"

# oneDNN and torch each keep 1,024 prepared products, half a megabyte for every shape of a bfloat16 product on a CPU,
# and shapes are new every step. Both read this at their first product, so torch may have been imported before.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
os.environ.setdefault("LRU_CACHE_CAPACITY", "16")
