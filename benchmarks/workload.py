"""Qwen3 models with random weights whose completions end, prompts, a reward, and the package's own stages step by step.

Random weights never draw an end token. Here every token is the last one with a probability close to a constant, so that
lengths are geometric up to the limit, and it is so through the weights alone (`add_ends`): every library that runs the
model meets the same distribution.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from measure import Row, Shape, synchronize
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from headwater.config import GRPO, Distill, Execution, ModelConfig, Optimizer
from headwater.meter import difference
from headwater.models.language_model import LanguageModel, load_model, wrap
from headwater.run import StageRun, set_deterministic
from headwater.stages import distill, grpo
from headwater.types import Message, Problem, Verdict

END, PAD, FIRST = 0, 1, 2
"""Ids of the end and padding tokens and of the first word."""
STUDENT = Shape(256, 4, 4, 2, 768, True, 64)
TEACHER = Shape(512, 6, 8, 4, 1536, True, 64)
"""With 49,152 tokens 15.7M and 44M parameters."""


def make(shape: Shape, vocab: int, mean_length: float | None, seed: int) -> Qwen3ForCausalLM:
    """A float32 model whose completions have about `mean_length` tokens; None: they never end."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=40_960,
        eos_token_id=END,
        pad_token_id=PAD,
        bos_token_id=None,
    )
    module = Qwen3ForCausalLM(config).eval()
    add_ends(module, 1 / mean_length if mean_length else 0.0)
    return module


@torch.no_grad()
def add_ends(module: Qwen3ForCausalLM, hazard: float) -> None:
    """Give the end token a probability of about `hazard` after every token.

    Channel 0 of the residual stream holds one constant, put there by every embedding and changed by no layer; the end
    token's row of the LM head reads that channel and nothing else. Its weight is found by bisection on random tokens.
    """
    embedding, head = module.get_input_embeddings().weight, module.get_output_embeddings().weight
    embedding[:, 0] = 0.08
    for layer in module.model.layers:
        layer.self_attn.o_proj.weight[0] = 0
        layer.mlp.down_proj.weight[0] = 0
    head[END] = 0
    hidden = module.model(torch.randint(FIRST, len(head), (4, 128)), use_cache=False)[0].flatten(0, 1)
    others = (hidden @ head[FIRST:].T).logsumexp(1).double()
    low, high = -100.0, 100.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        too_likely = (middle * hidden[:, 0].double() - others).sigmoid().mean() > hazard
        low, high = (low, middle) if too_likely else (middle, high)
    head[END, 0] = low


def words(vocab: int) -> PreTrainedTokenizerFast:
    """A token a word: `w2`, `w3`, ... ."""
    ids = {"<end>": END, "<pad>": PAD, **{f"w{i}": i for i in range(FIRST, vocab)}}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue] -- a property in Rust
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")


def save(directory: Path, shape: Shape, vocab: int, mean_length: float | None, seed: int) -> None:
    """Write the model and its tokenizer as a Hugging Face directory."""
    make(shape, vocab, mean_length, seed).save_pretrained(directory)
    words(vocab).save_pretrained(directory)


def settings_of(dtype: str) -> ModelConfig:
    return ModelConfig(source="file:random", template="none", dtype=dtype)  # pyright: ignore -- checked there


def load(directory: Path, dtype: str, device: str, *, trained: bool) -> LanguageModel:
    return load_model(settings_of(dtype), directory, device=device, trained=trained)


def build(shape: Shape, vocab: int, dtype: str, device: str, *, trained: bool, mean_length: float | None = None):
    """As `save` and `load`, in memory."""
    module = make(shape, vocab, mean_length, int(trained)).to(device)  # pyright: ignore[reportArgumentType] -- typed Module
    module = module.requires_grad_(True) if trained else module.to(getattr(torch, dtype)).requires_grad_(False)
    return wrap(module, words(vocab), settings_of(dtype))


def prompts(count: int, tokens: int, vocab: int, seed: int = 0) -> list[str]:
    """Random words, three quarters to five quarters of `tokens` in number."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3 * tokens // 4, 5 * tokens // 4 + 1, (count,), generator=draw).tolist()
    return [
        " ".join(f"w{i}" for i in torch.randint(FIRST, vocab, (n,), generator=draw).tolist()) for n in map(int, lengths)
    ]


def problems(texts: Sequence[str]) -> list[Problem]:
    return [Problem((Message("user", text),), answer="0") for text in texts]


def reward(completion: str) -> float:
    """1 where most words have odd numbers: cheap, and a coin flip that makes groups mixed."""
    odd = [word[-1] in "13579" for word in completion.split() if word[0] == "w"]
    return float(2 * sum(odd) > len(odd))


def grade(pairs: Sequence[tuple[Problem, str]]) -> list[Verdict]:
    scores = [reward(completion) for _, completion in pairs]
    return [Verdict(score == 1, True, "correct" if score else "wrong", score) for score in scores]


def run_stage(
    method: str,
    student: LanguageModel,
    teacher: LanguageModel | None,
    pool: list[Problem],
    *,
    steps: int,
    problems_per_step: int,
    group_size: int,
    new_tokens: int,
    on_step: Callable[[Row], None],
    micro_batch_tokens: int = Execution().micro_batch_tokens,
) -> None:
    """The package's own `grpo` or `distill` stage in a temporary directory.

    `on_step` gets each step's metrics and what it added to the meter, by role.
    """
    seen: dict = {}

    def log(done: int, steps: int, metrics: dict[str, float]) -> None:
        nonlocal seen
        now = run.meter.state()
        bill, seen = difference(now, seen), now
        on_step({"done": done, "metrics": metrics, "bill": bill})

    settings = {
        "steps": steps,
        "max_new_tokens": new_tokens,
        "problems_per_step": problems_per_step,
        "group_size": group_size,
        "optimizer": Optimizer(lr=1e-6),
    }
    set_deterministic(torch.get_num_threads())  # as every stage of a study runs
    with TemporaryDirectory() as directory:
        execution = Execution(save_every=10**6, micro_batch_tokens=micro_batch_tokens)
        run = StageRun(Path(directory), execution=execution, on_log=log)
        if method == "grpo":
            grpo.train(GRPO(**settings), policy=student, problems=pool, grade=grade, seed=0, run=run)
        else:
            distill.train(Distill(**settings), student=student, teacher=teacher, problems=pool, seed=0, run=run)


def timed_stage(
    method: str,
    student: LanguageModel,
    teacher: LanguageModel | None,
    pool: list[Problem],
    *,
    repeats: int,
    problems_per_step: int,
    group_size: int,
    new_tokens: int,
) -> list[Row]:
    """Seconds, in all and by role, of each step after the first, with its FLOPs."""
    rows: list[Row] = []
    start = time.perf_counter()

    def on_step(found: Row) -> None:
        nonlocal start
        synchronize()
        bill = found["bill"]
        rows.append(
            {
                "seconds": time.perf_counter() - start,
                **{role: bill[role]["seconds"] for role in ("sampled", "scored", "trained") if role in bill},
                "GFLOP": sum(row["flops"] for row in bill.values()) / 1e9,
                "mean length": found["metrics"]["completion/len_mean"],
            }
        )
        start = time.perf_counter()

    run_stage(
        method,
        student,
        teacher,
        pool,
        steps=repeats + 1,
        problems_per_step=problems_per_step,
        group_size=group_size,
        new_tokens=new_tokens,
        on_step=on_step,
    )
    return rows[1:]
