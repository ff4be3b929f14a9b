"""Checks of tokenizers, templates and end tokens: files are read, no weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from headwater.config import ModelConfig
from headwater.doctor.finding import Finding, judge
from headwater.models import template
from headwater.models.language_model import check_other_tokens, check_same_tokens, end_ids
from headwater.types import Message, Problem

TRICKY = (
    "The quick brown fox; it's 'quoted' \"twice\" -- (so) [what]? {No}! $5 & 100% @home #1 ~/a_b\\c",
    "0123456789 10 42 365 1,234.56 -7 3.14 1/2 2^10 12345678901234567890 007",
    "def f(x):\n\tif x > 0:\n\n        return x ** 2  # twice   \n",
    "ALL CAPS Mixed Case lower\n\n\nthree lines   three spaces",
    "\\boxed{\\frac{3}{4}} <answer>5</answer> #### 12\nThe answer is 7.",
    "naïve café Ångström Straße 日本語 Ελλάδα привет 😀 “quotes” – − × ÷ √2 π",
    "long " * 3000,
)
"""Texts that separate tokenizers: digits and their merges, spaces, cases, code, marks, other scripts, length."""
_THOUGHT = re.compile(r"<think>\s*(</think>\s*)?")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens", "max_length")


@dataclass(frozen=True)
class Patient:
    """A model of the recipe before its weights are loaded. The tokenizer has the template that the recipe names."""

    role: str
    config: ModelConfig
    directory: Path
    tokenizer: PreTrainedTokenizerBase
    generation: GenerationConfig
    positions: int | None
    """Tokens of context that the model was made for."""
    rows: int
    """Of the embedding, as the configuration says."""

    @classmethod
    def open(cls, role: str, config: ModelConfig, directory: Path) -> Patient:
        tokenizer = template.with_template(AutoTokenizer.from_pretrained(directory), config)
        settings = AutoConfig.from_pretrained(directory)
        try:
            generation = GenerationConfig.from_pretrained(directory)
        except OSError:  # transformers makes one from the model's configuration
            generation = GenerationConfig.from_model_config(settings)
        text = settings.get_text_config()
        positions = getattr(text, "max_position_embeddings", None)  # not every architecture has a limit
        return cls(role, config, directory, tokenizer, generation, positions, text.vocab_size)

    @property
    def ends(self) -> tuple[int, ...]:
        return end_ids(self.generation, self.tokenizer, self.config)


def check_model(patient: Patient, problems: Sequence[Problem]) -> Iterator[Finding]:
    """What one model's tokenizer, template and end tokens must fulfil by themselves."""
    yield _round_trip(patient, [*TRICKY, *(m.content for p in problems for m in p.messages)])
    yield _prompt(patient, problems)
    if patient.config.template != "none":
        yield _turn(patient)
    yield _ends(patient)
    yield _vocabulary(patient)


def check_pair(
    student: Patient, teacher: Patient, problems: Sequence[Problem], alignments: Set[str] = frozenset({"tokens"})
) -> Iterator[Finding]:
    """What the tokens of one model must mean to the other, where its scores are used token by token."""
    names = (student.config.source, teacher.config.source)
    if "spans" in alignments:
        check_other_tokens(student.tokenizer, teacher.tokenizer, names=names)
        yield Finding("ok", "tokens differ", "spans of text are compared, as alignment = 'spans' asks")
        if alignments == {"spans"}:
            return
    check_same_tokens(student.tokenizer, teacher.tokenizer, names=names)
    texts = [*TRICKY, *(m.content for p in problems for m in p.messages), *(p.answer or "" for p in problems)]
    pairs = [[template.plain(p.tokenizer, t) for p in (student, teacher)] for t in texts]
    differing = [text for text, (ours, theirs) in zip(texts, pairs, strict=True) if ours != theirs]
    yield judge(
        "same ids for the same text",
        "error" if differing else "ok",
        f"{len(differing)} of {len(texts)} texts get other ids from the teacher {names[1]} than from the student"
        + (f", for example {differing[0][:60]!r}" if differing else ""),
        "the teacher would judge tokens that the student never writes for this text",
        "take both tokenizers from one release; compare tokenizer.json of the two",
    )
    yield _same_prompt(student, teacher, problems)
    ours, theirs = (set(patient.ends) for patient in (student, teacher))
    shown = [[p.tokenizer.convert_ids_to_tokens(sorted(ids)) for p, ids in ((student, ours), (teacher, theirs))]]
    yield judge(
        "same end tokens",
        "ok" if ours == theirs else "warning" if ours & theirs else "error",
        f"student and teacher end with {shown[0][0]} and {shown[0][1]}",
        "the student is taught to end with a token that does not end its own completions: lengths run to the limit",
        "give both the same stop_tokens, or teach with a model of the same kind (base or instruct)",
    )


def _round_trip(patient: Patient, texts: Sequence[str]) -> Finding:
    def spaceless(text: str) -> str:
        return "".join(text.split())

    back = {t: str(patient.tokenizer.decode(template.plain(patient.tokenizer, t))) for t in texts}
    lost = [text for text in back if spaceless(back[text]) != spaceless(text)]
    plain = [text for text in lost if text.isascii()]
    example = (plain or lost or [""])[0]
    return judge(
        f"{patient.role}: text survives its tokenizer",
        "error" if plain else "warning" if lost else "ok",
        f"{len(lost)} of {len(back)} texts come back changed"
        + (f", for example {example[:60]!r} as {back[example][:60]!r}" if lost else ""),
        "prompts reach the model, and answers the grader, changed or cut",
        "look at normalizer, truncation, decoder and unknown tokens in tokenizer.json",
    )


def _prompt(patient: Patient, problems: Sequence[Problem]) -> Finding:
    """The prompts of real problems, as text and as ids."""
    name, tokenizer, config = f"{patient.role}: prompts", patient.tokenizer, patient.config
    silent = template.default_system(tokenizer, config)
    before, special = template.prefix(tokenizer), set(tokenizer.all_special_ids)
    for problem in problems:
        text, ids = (f(tokenizer, config, problem.messages) for f in (template.render, template.encode))
        if lost := [m.content for m in problem.messages if m.content.strip() not in text]:
            why = "the model does not see the problem"
            return Finding("error", name, f"the template drops or changes {lost[0][:80]!r}", why, "mend the template")
        inside = [t for m in problem.messages for t in template.plain(tokenizer, m.content) if t in special]
        if inside:
            seen = f"problem {problem.id} contains {tokenizer.convert_ids_to_tokens(inside)[0]!r}"
            why = "text of a problem that is read as a special token can end or fake a turn"
            return Finding("warning", name, seen, why, "clean the data")
        if before and ids[: len(before)] != before:
            seen = f"the template leaves out {tokenizer.decode(before)!r}, with which the tokenizer begins every text"
            why = "many models fall apart without their first token"
            return Finding("warning", name, seen, why, "copy the template to a file and name it: it is put in there")
    if "strftime_now" in str(tokenizer.chat_template) and config.template != "none":
        seen, why = "the template writes today's date", "prompts differ from day to day, and so do the results"
        return Finding("warning", name, seen, why, "copy the template to a file with a fixed date and name it")
    shown = template.render(tokenizer, config, problems[0].messages) if problems else ""
    return Finding("ok", name, f"{shown!r}" + (f"; system text of the template itself: {silent!r}" if silent else ""))


def _turn(patient: Patient) -> Finding:
    """A whole conversation is the prompt, the reply, and an end token."""
    tokenizer, config, reply = patient.tokenizer, patient.config, template.PROBE
    ask = [Message("user", "1+1?")]
    prompt = template.render(tokenizer, config, ask)
    whole = template.render(tokenizer, config, [*ask, Message("assistant", reply)])
    before, found, after = whole.partition(reply)
    same = _THOUGHT.sub("", before).split() == _THOUGHT.sub("", prompt).split()
    ended = set(template.plain(tokenizer, after)) & set(patient.ends)
    fault = (
        "drops the reply from a conversation" if not found
        else f"begins a reply with {prompt[-40:]!r} when asked for one, and with {before[-40:]!r} in a conversation"
        if not same
        else f"ends a reply with {after[:40]!r}, in which no end token is: {_tokens(patient, patient.ends)}"
        if not ended
        else ""
    )  # fmt: skip  # a condition a line
    return judge(
        f"{patient.role}: turns of the template",
        "error" if not found or not ended else "warning" if fault else "ok",
        f"the template {fault}" if fault else f"a reply stands between {before[-24:]!r} and {after[:16]!r}",
        "the model was trained on turns: it does not know when to answer, or never writes what ends a completion here",
        "take the template of the model's own release, or name the end of a turn in stop_tokens",
    )


def _ends(patient: Patient) -> Finding:
    tokenizer, config = patient.tokenizer, patient.config
    eos = patient.generation.eos_token_id
    named = {i for i in (eos if isinstance(eos, list) else [eos]) if i is not None}
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    vocabulary = tokenizer.get_vocab()
    chosen = {vocabulary[token] for token in config.stop_tokens}
    beyond = [i for i in patient.ends if i >= len(tokenizer)]
    ordinary = [i for i in patient.ends if i not in special | chosen and i not in beyond]
    # Byte-level tokenizers name a token otherwise than it reads: the end of a line is called "Ċ".
    names = {i: (_tokens(patient, [i])[0], str(tokenizer.decode([i]))) for i in patient.ends if i < len(tokenizer)}
    broken = [i for i, texts in names.items() if [i] not in (template.plain(tokenizer, text) for text in texts)]
    fault = (
        f"end token {beyond[0]} is beyond the {len(tokenizer)} tokens of the vocabulary" if beyond
        else f"{_tokens(patient, ordinary)} end a completion and are ordinary text" if ordinary
        else f"{_tokens(patient, broken)} are not read back as one token" if broken
        else f"the tokenizer ends with {tokenizer.eos_token!r}, generation_config.json with {sorted(named)}"
        if named and tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in named
        else ""
    )  # fmt: skip  # a condition a line
    said = {k: v for k in _SAMPLING if (v := getattr(patient.generation, k, None)) is not None}
    note = f"; generation_config.json asks for {said}, and the recipe alone decides" if said else ""
    shared = "; the padding token is an end token (endings are trained on all the same)"
    return judge(
        f"{patient.role}: end tokens",
        "error" if beyond or ordinary or broken else "warning" if fault else "ok",
        (fault or f"{_tokens(patient, patient.ends)}{note}")
        + (shared if not fault and tokenizer.pad_token_id in patient.ends else ""),
        "completions end in the middle of a text, or not where the model ends them; others that load it see it end "
        "elsewhere",
        "correct eos_token_id in generation_config.json and eos_token in tokenizer_config.json",
    )


def _vocabulary(patient: Patient) -> Finding:
    tokens, known = len(patient.tokenizer), patient.tokenizer.get_vocab()
    highest = max(known.values()) + 1
    return judge(
        f"{patient.role}: vocabulary",
        "error" if max(tokens, highest) > patient.rows or highest > tokens else "ok",
        f"{tokens} tokens (highest id {highest - 1}) and {patient.rows} rows: {patient.rows - tokens} rows are "
        "padding, never sampled and never normalised over",
        "ids without a row, or rows taken for padding that are tokens",
        "use the tokenizer that belongs to these weights",
    )


def _same_prompt(student: Patient, teacher: Patient, problems: Sequence[Problem]) -> Finding:
    texts = [[template.render(x.tokenizer, x.config, p.messages) for x in (student, teacher)] for p in problems]
    differing = [pair for pair in texts if pair[0] != pair[1]]
    asked = any(getattr(student.config, k) != getattr(teacher.config, k) for k in ("template", "system", "thinking"))
    return judge(
        "same prompt for the same problem",
        "ok" if not differing else "warning" if asked else "error",
        f"{len(differing)} of {len(texts)} prompts differ"
        + (f": student {differing[0][0][:300]!r}, teacher {differing[0][1][:300]!r}" if differing else ""),
        "the warmup trains the student on the teacher's prompts, and it is evaluated on its own",
        "give both models the same template, system and thinking",
    )


def _tokens(patient: Patient, ids: Sequence[int]) -> list[str]:
    return [str(token) for token in patient.tokenizer.convert_ids_to_tokens(list(ids))]
