"""A teacher with another tokenizer: its scores on spans of text, carried to the student's tokens.

docs/algorithms.md, section "Teachers with another tokenizer", says what is exact here and what is an approximation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from headwater.config import Distill, Warmup
from headwater.losses.dense import dense_divergence
from headwater.losses.numerics import matmul, matmul_dtype
from headwater.losses.policy import cross_entropy, span_reverse_kl
from headwater.losses.projection import token_logprobs
from headwater.models.language_model import LanguageModel, check_other_tokens
from headwater.models.token_text import TokenText, align, shared_tokens, token_text
from headwater.rollouts.batch import Batch, MicroBatch, micro_batches, states, unflatten
from headwater.run import StageRun
from headwater.scoring.log_probs import View, stored_scores
from headwater.types import Problem, Rollout
from headwater.update import Loss, Term

PLAIN = 0.01
"""At a plain place each model gives the tokens that the other lacks less than this."""
NOT_TEXT = -20.0
"""The teacher's log-prob of a token that spells no text: as good as none, and still a finite signal."""


@dataclass(frozen=True)
class Pair:
    """Student and teacher as bytes, and the student's id for each of the teacher's (-1: none)."""

    student: TokenText
    teacher: TokenText
    shared: Tensor

    @classmethod
    def of(cls, student: LanguageModel, teacher: LanguageModel) -> Pair:
        """Raises ValueError where the tokenizers are the same, which needs no spans, or their bytes are unknown."""
        names = (student.config.source, teacher.config.source)
        check_other_tokens(student.tokenizer, teacher.tokenizer, names=names)
        return cls.joined(token_text(student), token_text(teacher))

    @classmethod
    def joined(cls, student: TokenText, teacher: TokenText) -> Pair:
        """As `of`, of equal tokenizers too."""
        return cls(student, teacher, torch.tensor(shared_tokens(student, teacher)))

    @property
    def own(self) -> Tensor:
        """Ids of the student that the teacher lacks."""
        lacking = torch.ones(len(self.student.pieces), dtype=torch.bool)
        lacking[self.shared[self.shared >= 0]] = False
        return lacking.nonzero()[:, 0]


@dataclass(frozen=True)
class Aligned:
    """Completions as both models spell them; `spans[row]` counts tokens of (student, teacher)."""

    student: Batch
    teacher: Batch
    spans: list[list[tuple[int, int]]]

    def take(self, rows: Sequence[int]) -> Aligned:
        return Aligned(self.student.take(rows), self.teacher.take(rows), [self.spans[r] for r in rows])

    @property
    def covered(self) -> list[int]:
        """The student's tokens in spans, by row: those behind them have no signal."""
        return [sum(ours for ours, _ in row) for row in self.spans]


def aligned(
    pair: Pair, rollouts: Sequence[Rollout], problems: Sequence[Problem], *, sampled_by: Literal["student", "teacher"]
) -> Aligned:
    """Rollouts of one model, and their text as the other one writes it after its own prompt, then an end.

    The student's first token behind the text - an end, or what is no text - is a span with the teacher's next place, so
    that leaving text has a price; half a character at the length limit has none.
    """
    by_student = sampled_by == "student"
    writer, reader = (pair.student, pair.teacher) if by_student else (pair.teacher, pair.student)
    prompts = {i: reader.model.encode(p.messages) for i, p in {p.id: p for p in problems}.items()}
    read, spans = [], []
    for rollout in rollouts:
        written = writer.read(rollout.completion_ids)
        ids = reader.ids(b"".join(written).decode("utf-8"))
        pieces = [reader.pieces[i] or b"" for i in ids]
        row = align(written, pieces) if by_student else align(pieces, written)
        rest = rollout.completion_ids[sum(own if by_student else other for own, other in row) :]
        ended = len(rest) == 1 and rest[0] in writer.model.eos_ids and writer.pieces[rest[0]] is None
        half = not rollout.finished and sum(len(writer.pieces[i] or b"....") for i in rest) < 4
        read.append([*ids, reader.end])
        spans.append([*row, (1, 1)] if ended or (by_student and rest and not half) else row)
    own, other = Batch.of(rollouts), Batch([prompts[r.problem_id] for r in rollouts], read)
    return Aligned(own, other, spans) if by_student else Aligned(other, own, spans)


def with_scores(pair: Pair, rows: Aligned, k: int, view: View) -> Batch:
    """The student's batch with fields of its tokens.

    `weights`: 1 in spans, 0 behind them. At a span's first token, `first`: the teacher's log-prob `teacher` of the span
    (0 at its others), its mass `lacked` on tokens that the student lacks, and the k likeliest of its other tokens, in
    the student's ids, `teacher_ids` and `teacher_logprobs`.
    """
    k = min(k, len(pair.teacher.pieces))
    scored = _scores(pair, rows.teacher, k, view)
    fields: dict[str, list[Tensor]] = {}
    for row, spans in enumerate(rows.spans):
        length = len(rows.student.completions[row])
        ours, theirs = torch.tensor(spans, dtype=torch.long).reshape(-1, 2).unbind(1)
        at, their_at = ours.cumsum(0) - ours, theirs.cumsum(0) - theirs
        logprobs, lacked, top_ids, top_logprobs = (values[row] for values in scored)
        numbers = torch.arange(len(spans)).repeat_interleave(theirs)
        whole = torch.zeros(len(spans)).index_add(0, numbers, logprobs[: len(numbers)])
        if spans and not _same_text(pair, rows, row):
            whole[-1] = NOT_TEXT
        made = {
            "weights": (torch.arange(length) < int(ours.sum())).float(),
            "first": torch.zeros(length, dtype=torch.bool).index_fill(0, at, True),
            "teacher": torch.zeros(length).index_copy(0, at, whole),
            "lacked": torch.zeros(length).index_copy(0, at, lacked[their_at]),
            "teacher_ids": torch.zeros(length, k, dtype=torch.long).index_copy(0, at, top_ids[their_at]),
            "teacher_logprobs": torch.full((length, k), -math.inf).index_copy(0, at, top_logprobs[their_at]),
        }
        for name, values in made.items():
            fields.setdefault(name, []).append(values)
    return rows.student.with_fields(**fields)


def _same_text(pair: Pair, rows: Aligned, row: int) -> bool:
    """Whether the last span is text, or an end on both sides."""
    last = [sum(side) - 1 for side in zip(*rows.spans[row], strict=True)]
    ours, theirs = rows.student.completions[row][last[0]], rows.teacher.completions[row][last[1]]
    pieces = pair.student.pieces[ours], pair.teacher.pieces[theirs]
    return None not in pieces or (pieces == (None, None) and ours in pair.student.model.eos_ids)


@torch.no_grad()
def _scores(pair: Pair, batch: Batch, k: int, view: View) -> list[list[Tensor]]:
    """For every token of the teacher's rows its log-prob [tokens], the mass of tokens that the student lacks [tokens],
    and ids of the student and log-probs [tokens, k] of the likeliest others (-inf: fewer)."""
    teacher, parts = pair.teacher.model, []
    shared = pair.shared.to(teacher.device)
    for micro in micro_batches(batch, max_tokens=view.max_tokens, device=teacher.device, share=teacher.shares_prefixes):
        found: list[tuple[Tensor, ...]] = []
        hidden = states(teacher, micro)
        for chunk, targets in zip(*(x.split(view.chunk_tokens) for x in (hidden, micro.targets)), strict=True):
            logprobs = (teacher.logits(chunk).float() / view.temperature).log_softmax(-1)
            top = logprobs.masked_fill(shared < 0, -math.inf).topk(k)
            lacked = logprobs.exp()[:, shared < 0].sum(1)
            own = logprobs.gather(1, targets[:, None])[:, 0]
            found.append((own, lacked, shared[top.indices].clamp(min=0), top.values))
        parts.append((micro, [torch.cat(column) for column in zip(*found, strict=True)]))
    return [unflatten(batch, [(micro, columns[i]) for micro, columns in parts]) for i in range(4)]


def span_loss(settings: Distill | Warmup, pair: Pair, denominator: float, run: StageRun) -> Loss:
    """At plain places the divergence over the shared tokens; from others to the end of the next plain span the policy
    gradient of what was drawn (`distill`), or cross-entropy (`warmup`)."""
    student, forward = pair.student.model, isinstance(settings, Warmup)
    own, chunk = pair.own.to(student.device), run.execution.chunk_tokens
    common: dict[str, Any] = {"temperature": settings.temperature, "vocab_size": student.vocab_size}

    def loss(hidden: Tensor, head: Tensor, micro: MicroBatch):
        weights = micro.fields["weights"]
        plain = micro.fields["first"] & (micro.fields["lacked"] < PLAIN)
        rows = head[: student.vocab_size]
        plain[plain.clone()] = _mass(hidden[plain], rows, own, settings.temperature, chunk) < PLAIN
        unit, begins = _units(plain, micro)
        dense = plain if forward else plain & begins
        scores, exact = stored_scores(micro, settings.temperature), torch.where(dense, weights, 0.0)
        kind = "forward_kl" if forward else "reverse_kl"
        total, _, metrics = dense_divergence(hidden, head, scores, exact, kind=kind, chunk_tokens=chunk, **common)
        done = dense if forward else torch.isin(unit, unit[dense])
        if len(rest := ((weights != 0) & ~done).nonzero()[:, 0]):
            logprobs, _ = token_logprobs(hidden[rest], head, micro.targets[rest], chunk_tokens=chunk, **common)
            if forward:
                more, _, observed = cross_entropy(logprobs, weights[rest])
            else:
                teacher = micro.fields["teacher"][rest]
                more, _, observed = span_reverse_kl(logprobs, teacher, weights[rest], spans=unit[rest])
            total, metrics = total + more, {**metrics, **observed}
        metrics["spans/exact"] = (dense.sum(), (weights != 0).sum())
        metrics["spans/covered"] = ((weights != 0).sum(), torch.tensor(len(weights)))
        return [Term(total, denominator)], metrics

    return loss


def _units(plain: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor]:
    """Number of the unit that each token is in, and whether it begins one.

    A unit is what is drawn at once: spans up to the next one that begins at a plain place, that one included. Where a
    token of one model runs on beyond a token of the other, only the next token tells that a span has ended: scored
    alone, `1` would be told from `12` by what follows it, and lose.
    """
    at = micro.fields["first"].nonzero()[:, 0]
    rows = micro.sequence_ids[at]
    new = torch.ones_like(at, dtype=torch.bool)
    new[1:] = plain[at[:-1]] | (rows[1:] != rows[:-1])
    begins = torch.zeros_like(plain).index_copy(0, at, new)
    return begins.cumsum(0), begins


@torch.no_grad()
def _mass(hidden: Tensor, head: Tensor, ids: Tensor, temperature: float, chunk_tokens: int) -> Tensor:
    """Probability of `ids` together, after each hidden state."""
    if not len(ids):
        return hidden.new_zeros(len(hidden))
    dtype = matmul_dtype(hidden, head)
    products = (matmul(part, head.T, dtype) for part in hidden.split(chunk_tokens))
    return torch.cat([(p.float() / temperature).softmax(-1)[:, ids].sum(1) for p in products])
