"""Teacher scores: the two forms in which a teacher's next-token distributions travel.

A tokens x vocabulary tensor never travels. Hidden states with the LM head are exact and about 70 times smaller;
the top k log-probs are what an inference server can return.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class HiddenScores:
    """The teacher's last hidden states at the loss tokens and its LM head: exact over the whole vocabulary.

    `bias` is added to the logits; -inf entries forbid tokens to the teacher.
    """

    hidden: Float[Tensor, "tokens teacher_hidden"]
    head: Float[Tensor, "teacher_rows teacher_hidden"]
    bias: Float[Tensor, " teacher_rows"] | None = None


@dataclass(frozen=True)
class TopKScores:
    """The teacher's k most likely ids per loss token and their log-probs (nats), drawn up at `temperature`.

    What is missing from 1 is the mass of one tail bucket. An entry with log-prob -inf is padding, whatever its id.
    """

    ids: Int[Tensor, "tokens k"]
    logprobs: Float[Tensor, "tokens k"]
    temperature: float = 1.0
