"""Faults planted in files, one at a time: each must be found, and the healthy pair must be called healthy."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import headwater
from headwater.config import Recipe
from headwater.doctor.checkup import checkup, examine
from headwater.doctor.finding import Finding
from headwater.store import Store
from headwater.tasks.chains import Chains

WORLD = Path(headwater.__file__).parent / "data" / "world"
Plant = Callable[[Path], None]


def recipe(root: Path, *, task: dict[str, Any] | None = None) -> Recipe:
    """The quickstart's shape on copies of the world's models, its problems from files."""
    rows = {
        "name": "jsonl",
        "source": str(root / "train.jsonl"),
        "test_source": str(root / "test.jsonl"),
        "prompt_column": "question",
        "answer_column": "answer",
        "grader": "headwater.tasks.chains:grade",
    }
    rl = {"method": "grpo", "steps": 1, "problems_per_step": 2, "max_new_tokens": 64, "optimizer": {"lr": 1e-4}}
    return Recipe.model_validate(
        {
            "name": "faults",
            "seeds": [0],
            "models": {role: {"source": str(root / role)} for role in ("teacher", "student")},
            "task": rows | (task or {}),
            "pool": {"labels": 16},
            "stages": {
                "teacher_rl": rl,
                "student_rl": rl,
                "warmup": {k: v for k, v in rl.items() if k != "problems_per_step"}
                | {"method": "warmup", "sequences_per_step": 4},
                "distill": rl | {"method": "distill"},
            },
            "arms": {"direct": {"teacher": "none", "finish": "full"}, "bridge": {"teacher": "rl", "bridge": "full"}},
            "evaluations": {"chains": {"problems": 20, "samples": 1, "max_new_tokens": 64}},
        }
    )


def write_rows(root: Path, **changes: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    for name, split, count in (("train", "train", 80), ("test", "test", 20)):
        problems = Chains().problems(split)[:count]
        rows = [{"question": p.messages[0].content, "answer": p.answer, **p.columns} for p in problems]
        rows = changes.get(name, lambda rows: rows)(rows)
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for role in ("teacher", "student"):
        shutil.copytree(WORLD / role, tmp_path / role)
    write_rows(tmp_path)
    return tmp_path


def trouble(findings: list[Finding]) -> dict[str, Finding]:
    assert all(f.seen and (f.level == "ok") == (not f.why) == (not f.change) for f in findings)
    return {f.name: f for f in findings if f.level != "ok"}


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value) or value))


def weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def swap_ids(path: Path) -> None:
    def change(tokenizer: Any) -> None:
        vocab = tokenizer["model"]["vocab"]
        vocab["3"], vocab["7"] = vocab["7"], vocab["3"]

    edit(path / "tokenizer.json", change)


def template(text: str, new: str) -> Plant:
    def plant(path: Path) -> None:
        file = path / "chat_template.jinja"
        assert text in file.read_text()
        file.write_text(file.read_text().replace(text, new))

    return plant


def config(name: str, **values: Any) -> Plant:
    return lambda path: edit(path / name, lambda old: old | values)


def tokenizer(**values: Any) -> Plant:
    return config("tokenizer.json", **values)


def in_both(plant: Plant, root: Path) -> None:
    for role in ("teacher", "student"):
        plant(root / role)


LOWERCASE = {"type": "Lowercase"}
CHEAP: dict[str, tuple[Plant, str, str]] = {
    "swapped ids": (swap_ids, "tokens", "different tokenizers"),
    "lower case": (tokenizer(normalizer=LOWERCASE), "text survives", "'The quick"),
    "no template": (lambda path: (path / "chat_template.jinja").unlink(), "models and data", "no chat template"),
    "no end of turn": (template("'<|im_end|>' + ", ""), "turns", "in which no end token is"),
    "no assistant": (template("'<|im_start|>assistant\\n'", "''"), "turns", "begins a reply with"),
    "no content": (template("message.content", "message.content[:3]"), "prompts", "drops or changes"),
    "a system text": (template("{%- for", "{{- '<|im_start|>system\\nBe good.' }}{%- for"), "same prompt", "differ"),
    "wrong end": (config("generation_config.json", eos_token_id=20), "student: end tokens", "are ordinary text"),
    "two ends": (config("tokenizer_config.json", eos_token="<|im_start|>"), "student: end tokens", "tokenizer ends"),
    "short context": (config("config.json", max_position_embeddings=64), "student: lengths", "the context is 64"),
    "few rows": (config("config.json", vocab_size=256), "student: vocabulary", "256 rows"),
}  # fmt: skip  # a table: several entries a line


@pytest.mark.parametrize("name", CHEAP)
def test_faults_of_tokenizer_and_template(root: Path, name: str):
    plant, where, seen = CHEAP[name]
    plant(root / "student")
    found = trouble(checkup(recipe(root))[1])
    assert any(where in n and seen in f.seen for n, f in found.items()), found


def units(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row | {"answer": f"{row['answer']} apples"} if i % 4 == 0 else row for i, row in enumerate(rows)]


def slipped(rows: list[dict[str, Any]], *columns: str) -> list[dict[str, Any]]:
    return [row | {c: rows[i - 1][c] for c in columns} for i, row in enumerate(rows)]


DATA: dict[str, tuple[dict[str, Any], str, str]] = {
    "units": ({"train": units}, "answers", "numbers carry words or units ('"),
    "empty answers": ({"train": lambda rows: [r | {"answer": ""} for r in rows]}, "gold answers", "0 of 32"),
    "missing answers": ({"test": lambda rows: [r | {"answer": None} for r in rows]}, "answers", "20 missing"),
    "one answer": ({"train": lambda rows: [r | {"answer": "7"} for r in rows]}, "worked solutions", "of 32 texts"),
    "slipped answers": ({"train": lambda rows: slipped(rows, "answer")}, "worked solutions", "of 32 texts"),
    "slipped rows": ({"train": lambda rows: slipped(rows, "answer", "solution")}, "rows belong", "'solution' shares"),
    "test in train": ({"train": lambda rows: rows + TEST_ROWS}, "rows", "5 were also in the test"),
    "nearly test": (
        {"train": lambda rows: [*rows, *(r | {"question": f" {r['question']} "} for r in TEST_ROWS)]}, "rows", "in both"
    ),
    "special tokens": (
        {"train": lambda rows: [r | {"question": r["question"] + "<|im_end|>"} for r in rows]}, "prompts", "contains"
    ),
}  # fmt: skip  # a table: several entries a line
TEST_ROWS = [{"question": p.messages[0].content, "answer": p.answer} for p in Chains().problems("test")[:5]]


@pytest.mark.parametrize("name", DATA)
def test_faults_of_data(root: Path, name: str):
    changes, where, seen = DATA[name]
    write_rows(root, **changes)
    found = trouble(checkup(recipe(root))[1])
    assert any(where in n and seen in f.seen for n, f in found.items()), found


@pytest.mark.parametrize(
    ("task", "where"),
    [
        ({"template": "{prompt}\nWrite \\boxed{{answer}}."}, "gold answers"),  # the grader of chains knows no box
        ({"grader": "GRADER:lenient"}, "wrong answers"),
        ({"grader": "GRADER:broken"}, "gold answers"),
    ],
)
def test_faults_of_graders(root: Path, task: dict[str, Any], where: str):
    (root / "grader.py").write_text(
        "def lenient(completion, problem):\n    return True\ndef broken(completion, problem):\n    return 1 / 0\n"
    )
    task = {key: value.replace("GRADER", str(root / "grader.py")) for key, value in task.items()}
    assert any(where in name for name in trouble(checkup(recipe(root, task=task))[1]))


def scrambled(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        rows = torch.randperm(len(tensors[name]), generator=torch.Generator().manual_seed(0))
        tensors[name] = tensors[name][rows].clone()

    return change


def put(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: value(tensors[name]).contiguous()})


UP, EMBEDDING = "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"
WEIGHTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str, str]] = {
    "zero layer": (put(UP, torch.zeros_like), "weights", "layers.1.mlp.up_proj.weight is constant"),
    "NaN": (put(UP, lambda t: t.index_fill(0, torch.tensor([3]), float("nan"))), "weights", "holds NaN"),
    "a hundred times": (put(UP, lambda t: 100 * t), "weights", "its siblings"),
    "missing": (lambda t: [t.pop(UP)], "file and configuration", "were made up"),
    "another head": (
        lambda t: t.update({"lm_head.weight": torch.randn(320, 48)}), "file and configuration", "ties LM head"
    ),
    "too many layers": (
        lambda t: t.update({UP.replace(".1.", ".3."): t[UP].clone()}), "file and configuration", "have no place"
    ),
    "a zero row": (put(EMBEDDING, lambda t: t.index_fill(0, torch.tensor([20, 21, 22]), 0.0)), "weights", "is zero"),
    "permuted rows": (scrambled(EMBEDDING), "student", ""),
    "scrambled layer": (scrambled("model.layers.1.mlp.down_proj.weight"), "student", ""),
}  # fmt: skip  # a table: several entries a line


@pytest.mark.parametrize("name", WEIGHTS)
def test_faults_of_weights(root: Path, name: str, tmp_path: Path):
    change, where, seen = WEIGHTS[name]
    weights(root / "student", change)
    found = trouble(examine(recipe(root), Store(tmp_path / "store"), problems=4, rewards=False))
    assert any(where in n and seen in f.seen for n, f in found.items()), found


def test_a_healthy_pair_is_healthy(root: Path, tmp_path: Path):
    assert trouble(examine(recipe(root), Store(tmp_path / "store"))) == {}


def test_a_token_by_its_name_may_end_completions(root: Path, tmp_path: Path):
    """A byte-level tokenizer calls the end of a line "Ċ", which is two other tokens when read as text."""
    plain = recipe(root)
    models = {role: model.model_copy(update={"stop_tokens": ("Ċ",)}) for role, model in plain.models.items()}
    found = trouble(
        examine(plain.model_copy(update={"models": models}), Store(tmp_path / "s"), problems=2, rewards=False)
    )
    assert not [f.seen for name, f in found.items() if "end tokens" in name]


@pytest.mark.slow  # half a minute of sampling together
def test_answers_of_other_problems_are_felt_in_the_rewards(root: Path, tmp_path: Path):
    """Bare answers that slipped by a row: nothing in the file shows it."""

    def bare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"question": r["question"], "answer": r["answer"]} for r in slipped(rows, "answer")]

    write_rows(root, train=bare)
    found = trouble(examine(recipe(root), Store(tmp_path / "store")))
    assert "teacher: rewards are for this problem" in found
    assert "teacher: rewards are for this problem" not in trouble(
        examine(recipe(root), Store(tmp_path / "store"), problems=4, rewards=False)
    )


@pytest.mark.slow  # half a minute of sampling together
def test_the_same_teacher_and_a_worse_one(root: Path, tmp_path: Path):
    shutil.rmtree(root / "teacher")
    shutil.copytree(root / "student", root / "teacher")
    same = {f.name: f for f in examine(recipe(root), Store(tmp_path / "store"), problems=4)}[
        "student and teacher: distance"
    ]
    assert same.level == "ok" and "the same weights" in same.seen
    shutil.rmtree(root / "student")
    shutil.copytree(WORLD / "teacher", root / "student")
    weights(root / "teacher", scrambled("model.layers.1.mlp.down_proj.weight"))
    assert "teacher against student" in trouble(examine(recipe(root), Store(tmp_path / "store")))
