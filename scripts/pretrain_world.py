"""Pretrain the embedded world: a ladder of tiny Qwen3 models on arithmetic chains, gates, and the shipped ones.

    python scripts/pretrain_world.py                  train what is missing, evaluate, pick, write
    python scripts/pretrain_world.py --rungs 48x2,96x3 --no-ship

Killing it at any time loses at most a minute: run the same command again. One thread and float32 on CPU, so a rung
comes out the same bit for bit on one machine. Every rung sees the same documents in the same order.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from headwater.tasks import chains
from headwater.types import Problem

RUNGS = ("96x3", "80x3", "64x3", "64x2", "48x3", "56x2", "48x2")
SHIPPED = Path(__file__).parents[1] / "src" / "headwater" / "data" / "world"
CHANCE = 1 / chains.MODULUS
# Fixed before any arm was run; all on tuning problems, at temperature 1.
GATES = {
    "teacher": {"pass@1": (0.30, 0.55), "pass@8": (0.90, 1.0), "worked": (0.75, 1.0), "bare": (0.0, CHANCE + 0.05)},
    "student": {"pass@1": (0.10, 0.25), "pass@8": (0.45, 0.85), "worked": (0.30, 0.65), "bare": (0.0, CHANCE + 0.05)}
    | {"sft_pass@1": (0.75, 1.0)},
}
CHAT_TEMPLATE = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# Qwen's pre-tokenizer: digits stand alone.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Settings:
    """What decides the weights; a hash of it names the work directory, so no stale checkpoint is ever resumed."""

    seed: int = 0
    trained_tokens: int = 2_250_000
    """Tokens with a loss: completions and their end token. Prompts come on top, about 1.25 times as many."""
    batch_documents: int = 128
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    sft_steps: int = 300
    sft_learning_rate: float = 1e-3
    num_operations: tuple[int, int] = chains.NUM_OPERATIONS
    modulus: int = chains.MODULUS
    slip_rate: float = chains.SLIP_RATE
    single_step_share: float = chains.SINGLE_STEP_SHARE
    style_shares: str = json.dumps(chains.STYLE_SHARES)

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Corpus:
    """Token ids; document i is ids[starts[i] : starts[i + 1]] and its first prompts[i] tokens are the prompt."""

    ids: np.ndarray
    starts: np.ndarray
    prompts: np.ndarray


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE as Qwen's: 256 bytes, merges that spell the three role names only, three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(word[:i], word[i]) for word in ("user", "system", "assistant") for i in range(1, len(word))]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*alphabet, *(a + b for a, b in merges)]))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    words = pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])  # pyright: ignore[reportAttributeAccessIssue] -- a setter untyped
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue] -- likewise
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=256,
        chat_template=CHAT_TEMPLATE,
    )


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


def render(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    messages = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def encode(tokenizer: PreTrainedTokenizerBase, documents: Sequence[tuple[str, str]]) -> Corpus:
    """Prompt through the chat template, then the completion and the end token; the two parts are tokenised apart."""
    header, footer = render(tokenizer, "\0").split("\0")
    prompts = tokenizer([header + prompt + footer for prompt, _ in documents])["input_ids"]
    completions = tokenizer([completion + "<|im_end|>" for _, completion in documents])["input_ids"]
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    flat = [token for p, c in zip(prompts, completions, strict=True) for part in (p, c) for token in part]
    return Corpus(
        np.array(flat, dtype=np.int16), np.concatenate([[0], np.cumsum(lengths)]), np.array([len(p) for p in prompts])
    )


def build_corpus(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Corpus:
    rng = random.Random(f"corpus/{settings.seed}")
    documents, trained = [], 0
    while trained < settings.trained_tokens:
        documents.append(chains.corpus_document(rng))
        trained += len(documents[-1][1]) + 1  # a completion is ASCII without letters: one token a character
    return encode(tokenizer, documents)


def load_corpus(work: Path, settings: Settings) -> Corpus:
    path = work / "corpus.npz"
    if not path.exists():
        corpus = build_corpus(build_tokenizer(), settings)
        temporary = work / f"corpus.{os.getpid()}.npz"
        np.savez(temporary, **vars(corpus))
        temporary.replace(path)
    return Corpus(**np.load(path))


def micro_batches(corpus: Corpus, members: np.ndarray, parts: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
    """Input ids and trained-target mask, in parts of similar length: little padding without skewing the step's mix."""
    lengths = np.diff(corpus.starts)
    for part in np.array_split(members[np.argsort(lengths[members], kind="stable")], parts):
        ids = np.zeros((len(part), lengths[part].max()), dtype=np.int64)
        mask = np.zeros(ids.shape, dtype=bool)
        for row, document in enumerate(part):
            start, end = corpus.starts[document], corpus.starts[document + 1]
            ids[row, : end - start] = corpus.ids[start:end]
            mask[row, corpus.prompts[document] : end - start] = True
        yield torch.from_numpy(ids), torch.from_numpy(mask[:, 1:])


def build_model(rung: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> Qwen3ForCausalLM:
    hidden, layers = (int(part) for part in rung.split("x"))
    config = Qwen3Config(
        vocab_size=64 * math.ceil(len(tokenizer) / 64),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 16,
        num_key_value_heads=hidden // 16,
        head_dim=16,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=token_id(tokenizer, "<|im_end|>"),
        pad_token_id=token_id(tokenizer, "<|endoftext|>"),
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    model.generation_config.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    return model


def step_loss(model: Qwen3ForCausalLM, corpus: Corpus, members: np.ndarray) -> float:
    """Accumulate the gradient of the mean cross-entropy over the step's trained tokens; return it in nats."""
    trained = int((corpus.starts[members + 1] - corpus.starts[members] - corpus.prompts[members]).sum())
    total = 0.0
    for ids, mask in micro_batches(corpus, members):
        # Right padding needs no attention mask: causal attention never looks at it, and it has no loss.
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[mask]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), ids[:, 1:][mask], reduction="sum") / trained
        loss.backward()
        total += loss.item()
    return total


def cosine(step: int, num_steps: int, warmup: int) -> float:
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def train(rung: str, work: Path, settings: Settings) -> Qwen3ForCausalLM:
    """Pretrain one rung from its last checkpoint on, a checkpoint a minute; the finished model is saved once."""
    directory = work / rung
    if (directory / "model" / "config.json").exists():
        return Qwen3ForCausalLM.from_pretrained(directory / "model")
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer, corpus = build_tokenizer(), load_corpus(work, settings)
    model = build_model(rung, tokenizer, settings.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay, fused=True
    )
    num_steps, first, seconds = len(corpus.prompts) // settings.batch_documents, 0, 0.0
    if (directory / "checkpoint.pt").exists():
        state = torch.load(directory / "checkpoint.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["step"], state["seconds"]
    began = saved = time.monotonic()
    for step in range(first, num_steps):
        members = np.arange(step * settings.batch_documents, (step + 1) * settings.batch_documents)
        rate = settings.learning_rate * cosine(step, num_steps, settings.warmup_steps)
        loss = update(model, optimizer, corpus, members, rate)
        if (step + 1) % 50 == 0:
            print(f"{rung} step {step + 1}/{num_steps} loss {loss:.4f} s {seconds + time.monotonic() - began:.0f}")
        if time.monotonic() - saved > 60:
            saved = time.monotonic()
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state | {"seconds": seconds + saved - began}, directory / f"checkpoint.{os.getpid()}")
            (directory / f"checkpoint.{os.getpid()}").replace(directory / "checkpoint.pt")
    record = {"parameters": model.num_parameters(), "seconds": round(seconds + time.monotonic() - began, 1)}
    (directory / "training.json").write_text(json.dumps(record))
    save_model(model, tokenizer, directory / "model")
    return model


def update(
    model: Qwen3ForCausalLM, optimizer: torch.optim.Optimizer, corpus: Corpus, members: np.ndarray, rate: float
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = step_loss(model, corpus, members)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
    optimizer.step()
    optimizer.zero_grad()
    return loss


def save_model(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    temporary = directory.with_name(f"{directory.name}.{os.getpid()}")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.replace(directory)


def fine_tune(model: Qwen3ForCausalLM, settings: Settings) -> None:
    """Supervised steps on clean worked answers to fresh train problems, in place: has dense signal room to work?"""
    count = settings.sft_steps * settings.batch_documents
    problems = chains.Chains(seed=settings.seed, train=count).problems("train")
    corpus = encode(build_tokenizer(), [(p.messages[0].content, chains.worked_solution(p)) for p in problems])
    optimizer = torch.optim.AdamW(model.parameters(), settings.sft_learning_rate, weight_decay=0.0, fused=True)
    for step in range(settings.sft_steps):
        members = np.arange(step * settings.batch_documents, (step + 1) * settings.batch_documents)
        update(model, optimizer, corpus, members, settings.sft_learning_rate * cosine(step, settings.sft_steps, 10))


@torch.no_grad()
def sample(model: Qwen3ForCausalLM, problems: Sequence[Problem], num_samples: int, seed: int) -> list[list[str]]:
    """Completions at temperature 1, one list for each problem."""
    tokenizer = build_tokenizer()
    tokenizer.padding_side = "left"
    prompts = [render(tokenizer, problem.messages[0].content) for problem in problems]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    torch.manual_seed(seed)
    out = model.eval().generate(  # pyright: ignore[reportAttributeAccessIssue] -- typed without it
        **batch,
        num_return_sequences=num_samples,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=64,
    )
    texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]


def evaluate(model: Qwen3ForCausalLM, seed: int, num_problems: int = 200, num_samples: int = 8) -> dict[str, Any]:
    """pass@1 with its 95 % interval over problems, unbiased pass@8, and share x accuracy of each style."""
    problems = chains.Chains(tuning=num_problems).problems("tuning")
    texts = sample(model, problems, num_samples, seed)
    verdicts = [[chains.grade(text, p) for text in group] for group, p in zip(texts, problems, strict=True)]
    rates = np.array([np.mean([v.correct for v in group]) for group in verdicts])
    half = 1.96 * rates.std(ddof=1) / math.sqrt(num_problems)
    flat = [v for group in verdicts for v in group]
    styles = {}
    for style in ("bare", "skim", "worked", None):
        right = [v.correct for v in flat if v.style == style]
        styles[str(style)] = {"share": len(right) / len(flat), "accuracy": float(np.mean(right)) if right else None}
    return {
        "pass@1": float(rates.mean()),
        "pass@1_ci95": [float(rates.mean() - half), float(rates.mean() + half)],
        "pass@8": float(np.mean(rates > 0)),
        "parsed": float(np.mean([v.parsed for v in flat])),
        "styles": styles,
    }


def measure(rung: str, work: Path, settings: Settings) -> None:
    """Train a rung if need be, then write its evaluation, with and without the supervised check."""
    path = work / rung / "evals.json"
    model = train(rung, work, settings)
    if path.exists():
        return
    evals = evaluate(model, settings.seed)
    print(rung, json.dumps(evals))
    fine_tune(model, settings)
    evals["sft"] = evaluate(model, settings.seed)
    evals |= json.loads((work / rung / "training.json").read_text())
    path.with_suffix(".partial").write_text(json.dumps(evals, indent=1))
    path.with_suffix(".partial").replace(path)
    print(rung, json.dumps(evals["sft"]))


def gate_values(evals: dict[str, Any]) -> dict[str, float]:
    values = {style: evals["styles"][style]["accuracy"] or 0.0 for style in ("worked", "bare")}
    return values | {"pass@1": evals["pass@1"], "pass@8": evals["pass@8"], "sft_pass@1": evals["sft"]["pass@1"]}


def pick(ladder: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The smallest rung that passes the teacher's gates, the largest that passes the student's; absent where none.

    `larger`, the control of a larger teacher, is the top of the ladder where that is not the teacher itself.
    """
    by_size = sorted(ladder, key=lambda rung: ladder[rung]["parameters"])
    chosen = {}
    for role, order in (("student", by_size), ("teacher", by_size[::-1])):
        for rung in order:
            values = gate_values(ladder[rung])
            if all(low <= values[name] <= high for name, (low, high) in GATES[role].items()):
                chosen[role] = rung
    if by_size[-1] not in chosen.values():
        chosen["larger"] = by_size[-1]
    return chosen


def ship(work: Path, settings: Settings, ladder: dict[str, dict[str, Any]], out: Path, command: str) -> None:
    """Copy the chosen rungs to `out` and write `world.json`: settings, gates, measurements, the hash of each file."""
    chosen = pick(ladder)
    if not {"teacher", "student"} <= set(chosen):
        raise ValueError(f"gates passed only for {chosen}; add rungs, or change the operations or the modulus")
    files = {}
    for role, rung in chosen.items():
        shutil.rmtree(out / role, ignore_errors=True)
        shutil.copytree(work / rung / "model", out / role, copy_function=shutil.copyfile)
        for path in sorted((out / role).iterdir()):
            files[f"{role}/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    corpus = load_corpus(work, settings)
    counts = {"documents": len(corpus.prompts), "tokens": len(corpus.ids)}
    counts["trained_tokens"] = len(corpus.ids) - int(corpus.prompts.sum())
    world = {"task": "chains", "rungs": chosen, "command": command, "torch": torch.__version__}
    world |= {
        "settings": asdict(settings),
        "corpus": counts | {"sha256": hashlib.sha256(corpus.ids.tobytes()).hexdigest()},
    }
    world |= {"gates": GATES, "ladder": ladder, "files": files}
    (out / "world.json").write_text(json.dumps(world, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(platformdirs.user_data_dir("headwater")) / "world")
    parser.add_argument("--rungs", default=",".join(RUNGS), help="hidden x layers, comma separated, in training order")
    parser.add_argument("--jobs", type=int, default=2, help="rungs trained at once, one thread each")
    parser.add_argument("--trained-tokens", type=int, default=Settings.trained_tokens)
    parser.add_argument("--out", type=Path, default=SHIPPED)
    parser.add_argument("--no-ship", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    settings = Settings(trained_tokens=args.trained_tokens)
    work = args.work / settings.key
    work.mkdir(parents=True, exist_ok=True)
    if args.only:
        return measure(args.only, work, settings)
    load_corpus(work, settings)
    rungs = args.rungs.split(",")

    def launch(rung: str) -> None:
        options = ["--only", rung, "--work", str(args.work), "--trained-tokens", str(args.trained_tokens)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-u", __file__, *options], check=True, env=environment)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(launch, rungs))
    ladder = {rung: json.loads((work / rung / "evals.json").read_text()) for rung in rungs}
    for rung, evals in ladder.items():
        print(rung, {name: round(value, 3) for name, value in gate_values(evals).items()})
    print(pick(ladder))
    if not args.no_ship:
        ship(work, settings, ladder, args.out, f"python scripts/pretrain_world.py --rungs {args.rungs}")


if __name__ == "__main__":
    main()
