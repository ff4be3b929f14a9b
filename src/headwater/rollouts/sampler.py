"""Sampling from a transformers model: batched decoding with a KV cache, one counter-based random number per token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from headwater import flops
from headwater.flops import Work
from headwater.mesh import Mesh
from headwater.models.language_model import ATTENTION, LanguageModel
from headwater.models.template import ends_in_stop, stop_length
from headwater.rollouts import streams
from headwater.rollouts.caches import RoomyLayer, Slots
from headwater.rollouts.decoding import Decoder
from headwater.rollouts.draw import draw
from headwater.types import Problem, Rollout


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. `stream` names the random numbers: (purpose, seed, step)."""

    stream: tuple[object, ...]
    group_size: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


class Sampler(Protocol):
    """Owns its weights; `load` brings them up to date before `sample`."""

    def load(self, weights: object, version: int) -> None: ...

    def sample(self, problems: Sequence[Problem], sampling: Sampling) -> list[Rollout]: ...


class TransformersSampler:
    """Samples from the very module that is trained, so `load` only notes the version.

    A rollout depends on (stream, problem, index) and the weights alone: not on the batch it was drawn in, nor on the
    ranks that share the work (each returns all rollouts).
    """

    def __init__(self, model: LanguageModel, *, max_tokens: int = 262_144, mesh: Mesh | None = None) -> None:
        self.model = model
        self.max_tokens = max_tokens
        self.mesh = mesh or Mesh()
        self.version = 0
        self.prefilled = self.decoded = Work()
        """What the last call of `sample` put through the model on all ranks, padding included."""

    def load(self, weights: object, version: int) -> None:
        self.version = version

    def sample(self, problems: Sequence[Problem], sampling: Sampling) -> list[Rollout]:
        """`group_size` completions of every problem, in order: problem by problem, index by index.

        Where a problem comes again its indices go on counting, so its rollouts differ.
        """
        return self.complete(problems, [self.model.encode(p.messages) for p in problems], sampling)

    @torch.inference_mode()
    def complete(self, problems: Sequence[Problem], prompts: list[list[int]], sampling: Sampling) -> list[Rollout]:
        """As `sample`, from token ids in place of the problems' own prompts: a prompt and the beginning of an
        answer."""
        first, seen = [], Counter[str]()
        for problem in problems:
            first.append(seen[problem.id] * sampling.group_size)
            seen[problem.id] += 1
        mine = self.mesh.shard(range(len(problems)))
        by_length = sorted(mine, key=lambda i: -len(prompts[i]))
        # Compiled layers would be compiled again for every shape and kind of cache.
        as_written = torch.compiler.set_stance("force_eager") if self.model.compiled else nullcontext()
        groups: list[list[Rollout]] = [[] for _ in problems]
        prefilled, decoded = Work(), Work()
        with sdpa_kernel(ATTENTION), as_written:
            while by_length:
                width = len(prompts[by_length[0]]) + sampling.max_new_tokens
                count = max(1, self.max_tokens // (width * sampling.group_size))
                chosen, by_length = by_length[:count], by_length[count:]
                places = [(problems[i].id, first[i] + g) for i in chosen for g in range(sampling.group_size)]
                rollouts, read, work = self._decode(places, [prompts[i] for i in chosen], sampling)
                prefilled, decoded = prefilled + read, decoded + work
                for place, i in enumerate(chosen):
                    groups[i] = rollouts[place * sampling.group_size : (place + 1) * sampling.group_size]
        self.prefilled, self.decoded = (flops.total(self.mesh.collect(work)) for work in (prefilled, decoded))
        return [rollout for group in self.mesh.gather([groups[i] for i in mine]) for rollout in group]

    def _decode(
        self, places: list[tuple[str, int]], prompts: list[list[int]], sampling: Sampling
    ) -> tuple[list[Rollout], Work, Work]:
        """One completion for every place (problem, index), and the work of reading prompts and of decoding;
        `group_size` consecutive places share a prompt."""
        model, group = self.model, sampling.group_size
        keys = np.array([streams.key(*sampling.stream, *place) for place in places], dtype=np.uint64)
        cache = DynamicCache(config=model.module.config)
        plain = all(type(layer) is DynamicLayer for layer in cache.layers)
        replayable = plain and _replayable(model)
        if not replayable:
            cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        # A layer with a window counts slots, and padding may not stand between what it sees.
        shared = _shared(prompts) if plain else 0
        ids, mask, lengths = _pad_left([p[shared:] for p in prompts], sampling.max_new_tokens, model.device)
        rows, width = ids.shape
        read = Work(rows * width, rows * width * (shared + width))
        if shared:
            first = torch.tensor([prompts[0][:shared]], device=model.device)
            _forward(model, first, torch.ones_like(first), torch.arange(shared, device=model.device)[None], cache)
            cache.batch_repeat_interleave(rows)
            mask, lengths = torch.cat([mask.new_ones(rows, shared), mask], 1), lengths + shared
            read += flops.padded_work(1, shared)
        seen = mask[:, : shared + width]
        hidden = _forward(model, ids, seen, (seen.cumsum(1) - 1)[:, shared:].clamp(min=0), cache)
        hidden = hidden.repeat_interleave(group, 0)
        if plain and not replayable and Decoder.fits(model):
            reader = Decoder(model, cache, seen, group, sampling.max_new_tokens)
            drawn = _step_by_step(model, reader, hidden, keys, sampling)
        else:
            cache.batch_repeat_interleave(group)
            mask, lengths = mask.repeat_interleave(group, 0), lengths.repeat_interleave(group)
            if replayable:
                drawn = _replay(model, _Start(hidden, mask, lengths, cache, keys), sampling)
            else:
                # Made once: transformers would make it of a mask anew for every token.
                reader = _Modules(model, cache, _bias(mask, hidden.dtype) if plain else mask, lengths, shared + width)
                drawn = _step_by_step(model, reader, hidden, keys, sampling)
        tokens, logprobs, count, work = drawn
        prompts = [prompt for prompt in prompts for _ in range(group)]
        return self._rollouts(places, prompts, tokens.tolist(), logprobs.tolist(), count.tolist()), read, work

    def _rollouts(
        self,
        places: list[tuple[str, int]],
        prompts: list[list[int]],
        tokens: list[list[int]],
        logprobs: list[list[float]],
        counts: list[int],
    ) -> list[Rollout]:
        out = []
        for row, count in enumerate(counts):
            completion = tokens[row][:count]
            out.append(
                Rollout(
                    problem_id=places[row][0],
                    index=places[row][1],
                    prompt_ids=prompts[row],
                    completion_ids=completion,
                    sampler_logprobs=logprobs[row][:count],
                    text=self.model.decode(completion),
                    finished=self.model.is_finished(completion),
                    policy_version=self.version,
                )
            )
        return out


@dataclass(frozen=True)
class _Start:
    """A batch after its prompts, one row for every completion.

    `hidden` [rows, hidden] of the last prompt token; `mask` [rows, width + limit], 0 at padding; prompt `lengths`
    [rows]; the keys of the random numbers.
    """

    hidden: Tensor
    mask: Tensor
    lengths: Tensor
    cache: DynamicCache
    keys: np.ndarray


class _Modules:
    """One more token a row through the model as transformers wrote it; `mask` [rows, ..., width + limit] may be a bias,
    and `seen` slots of it are filled."""

    def __init__(self, model: LanguageModel, cache: DynamicCache, mask: Tensor, lengths: Tensor, seen: int) -> None:
        self.model, self.cache, self.mask, self.places, self.seen = model, cache, mask, lengths, seen

    def step(self, token: Tensor) -> Tensor:
        """Last hidden states [rows, hidden] behind `token` [rows]."""
        self.seen += 1
        mask, places, self.places = self.mask[..., : self.seen], self.places[:, None], self.places + 1
        return _forward(self.model, token[:, None], mask, places, self.cache)

    @property
    def pairs(self) -> int:
        """Of queries and keys, in a layer's last step."""
        return len(self.places) * self.seen

    def keep(self, rows: Tensor) -> None:
        self.mask, self.places = self.mask[rows], self.places[rows]
        self.cache.batch_select_indices(rows)


def _step_by_step(
    model: LanguageModel, reader: Decoder | _Modules, hidden: Tensor, keys: np.ndarray, sampling: Sampling
) -> tuple[Tensor, Tensor, Tensor, Work]:
    """After prompts whose last states are `hidden` [rows, hidden]: tokens and log-probs [rows, limit], how many of each
    row count, and the work."""
    limit, rows, device = sampling.max_new_tokens, len(keys), hidden.device
    eos = torch.tensor(model.eos_ids)
    uniform = _uniforms(keys, range(limit), torch.device("cpu"))
    tokens = torch.zeros(limit, rows, dtype=torch.long)
    logprobs = torch.zeros(limit, rows, dtype=torch.float32)
    alive = torch.arange(rows)  # rows of the output that each row of the batch writes
    running = torch.ones(rows, dtype=torch.bool)  # of the rows of the batch
    work = Work()
    for position in range(limit):
        token, logprob = _draw(model, hidden, uniform[position].to(device), sampling)
        here = token.cpu()
        tokens[position].index_copy_(0, alive, here)
        logprobs[position].index_copy_(0, alive, logprob.cpu())
        work += Work(logits=len(alive))
        running &= (here[:, None] != eos).all(1)
        if model.config.stop:
            texts = tokens[: position + 1, alive].T.tolist()
            running &= torch.tensor([not ends_in_stop(model.tokenizer, ids, model.config.stop) for ids in texts])
        num_running = int(running.sum())
        if not num_running or position + 1 == limit:
            break
        # Leaving costs a copy of the cache: rows leave in lots of a quarter.
        if num_running <= 0.75 * len(alive):
            index = running.nonzero().squeeze(1)
            alive, running, uniform = alive[index], running[index], uniform[:, index]
            token = token[index.to(device)]
            reader.keep(index.to(device))
        hidden = reader.step(token)
        work += Work(len(alive), reader.pairs)
    tokens, logprobs = tokens.T.contiguous(), logprobs.T.contiguous()
    return tokens, logprobs, _counts(model, tokens), work


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of all heads, [rows, 1, 1, keys]: nothing, or -inf where `mask` [rows, keys] is 0."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask == 0, -torch.inf)[:, None, None]


SHARED_FROM = 32
"""Tokens that prompts of a batch must begin with alike to be read once."""
SEGMENT, CHECK = 256, 32
"""Steps that one CUDA graph serves at most; steps between looks at which rows have ended."""


def _replayable(model: LanguageModel) -> bool:
    """On one CUDA device; every layer must attend to all that came before, too."""
    return model.device.type == "cuda" and not hasattr(model.module, "hf_device_map")


def _replay(model: LanguageModel, start: _Start, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor, Work]:
    """As `_step_by_step`, replaying a CUDA graph of a step: Python takes several times longer to launch its kernels.

    A graph has fixed addresses and shapes. So tokens are drawn in segments, each with room in the cache for all its
    tokens and with the rows that had not ended before; rows that end within one are decoded on, and that is ignored.
    """
    limit, rows, device = sampling.max_new_tokens, len(start.keys), start.hidden.device
    width, mask, lengths = start.mask.shape[1] - limit, start.mask, start.lengths
    eos = torch.tensor(model.eos_ids, device=device)
    tokens, logprobs = torch.zeros(rows, limit, dtype=torch.long), torch.zeros(rows, limit, dtype=torch.float32)
    filled: list[Any] = start.cache.layers  # Any: transformers types layers of other kinds too
    slots = Slots([x.keys for x in filled], [x.values for x in filled], mask.new_tensor([width]))
    filled.clear()  # else the prompts' keys and values would live as long as `start`
    token, logprob = _draw(model, start.hidden, _uniforms(start.keys, range(1), device)[0], sampling)
    tokens[:, 0], logprobs[:, 0] = token.cpu(), logprob.cpu()
    alive, ended, done, work = np.arange(rows), torch.isin(token, eos), 1, Work(logits=rows)
    while done < limit and not bool(ended.all()):
        keep = (~ended).nonzero().squeeze(1)
        alive, token, mask, lengths = alive[keep.cpu().numpy()], token[keep], mask[keep], lengths[keep]
        segment = max(1, SEGMENT // 4) if model.config.stop else SEGMENT
        stop, used = min(done + segment, limit), width + done - 1
        size = -(-(width + stop) // 64) * 64
        slots.resize(keep, used, size)
        bias = torch.full((len(keep), 1, 1, size), -torch.inf, dtype=start.hidden.dtype, device=device)
        bias[..., :used] = _bias(mask[:, :used], bias.dtype)
        uniform = _uniforms(start.keys[alive], range(done, stop), device)
        drawn, scored, ended = _segment(model, token, bias, lengths + done - 1, slots, uniform, eos, sampling)
        stop, token = done + len(drawn), drawn[-1]
        work += Work(1, size, 1) * drawn.numel()
        tokens[alive, done:stop], logprobs[alive, done:stop] = drawn.T.cpu(), scored.T.cpu()
        if model.config.stop:
            ended = ended | (_counts(model, tokens[alive, :stop]) < stop).to(device)
        done = stop
    return tokens, logprobs, _counts(model, tokens), work


def _counts(model: LanguageModel, tokens: Tensor) -> Tensor:
    """How many tokens [rows, steps] count: up to the first end token or the one that completes a stop string."""
    last = torch.isin(tokens, torch.tensor(model.eos_ids))
    counts = torch.where(last.any(1), last.int().argmax(1) + 1, tokens.shape[1])
    if not model.config.stop:
        return counts
    rows = [row[:count] for row, count in zip(tokens.tolist(), counts.tolist(), strict=True)]
    return torch.tensor([stop_length(model.tokenizer, row, model.config.stop) or len(row) for row in rows])


def _segment(
    model: LanguageModel,
    token: Tensor,
    bias: Tensor,
    positions: Tensor,
    slots: Slots,
    uniform: Tensor,
    eos: Tensor,
    sampling: Sampling,
) -> tuple[Tensor, Tensor, Tensor]:
    """Continue after `token` [rows]: tokens and log-probs [steps, rows], and which rows have ended.

    As many steps as `uniform` has, or fewer: it stops when half of the rows have ended.
    """
    drawn, scored = torch.zeros_like(uniform, dtype=torch.long), torch.zeros_like(uniform, dtype=torch.float32)
    step, ended = torch.zeros_like(slots.at), torch.zeros_like(token, dtype=torch.bool)

    def once() -> None:
        bias.index_fill_(3, slots.at, 0.0)
        hidden = _forward(model, token[:, None], bias, positions[:, None], slots)
        new, logprob = _draw(model, hidden, uniform.index_select(0, step)[0], sampling)
        token.copy_(new)
        drawn.index_copy_(0, step, new[None])
        scored.index_copy_(0, step, logprob[None])
        ended.logical_or_((new[:, None] == eos).any(1))
        for counter in (step, slots.at, positions):
            counter += 1

    once()  # by Python: what libraries set up at a first call cannot be captured
    again = _captured(once) if token.is_cuda and len(uniform) > 1 else once
    for done in range(1, len(uniform)):
        if done % CHECK == 0 and 2 * int(ended.sum()) >= len(ended):
            return drawn[:done], scored[:done], ended
        again()
    return drawn, scored, ended


def _captured(work: Callable[[], None]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph.replay


def _uniforms(keys: np.ndarray, positions: range, device: torch.device) -> Tensor:
    """[positions, rows]"""
    return torch.from_numpy(streams.uniforms(keys[None], np.array(positions)[:, None])).to(device)


def _draw(model: LanguageModel, hidden: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    how = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return draw(model.logits(hidden), uniform, **how)


def _shared(prompts: list[list[int]]) -> int:
    """How many tokens all prompts begin with - instructions, worked examples - and leave a token to each; 0 where that
    is too little to be worth a pass of its own."""
    least, most = min(prompts), max(prompts)
    limit = min(map(len, prompts)) - 1
    count = next((i for i in range(limit) if least[i] != most[i]), limit)
    return count if count >= SHARED_FROM and len(prompts) > 1 else 0


def _pad_left(prompts: list[list[int]], extra: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.ones(len(prompts), width + extra, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, : width - len(prompt)] = 0
    return ids.to(device), mask.to(device), torch.tensor([len(p) for p in prompts], device=device)


def _forward(model: LanguageModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache | Slots) -> Tensor:
    """Last hidden state of the last position, extending the cache."""
    out = model.base(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    return out[0][:, -1].to(ids.device)
