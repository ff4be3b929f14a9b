"""A teacher behind a vLLM URL teaches what it teaches with its weights at hand, and its server's faults are named."""

import json
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_vllm
import miniature
import pytest
import tomli_w
import torch
from fake_vllm import FakeVLLM
from typer.testing import CliRunner

from headwater.cli import app
from headwater.config import SFT, Distill, Served, Warmup, load_recipe
from headwater.doctor.checkup import checkup
from headwater.models import server
from headwater.models.language_model import LanguageModel, load_model, load_served
from headwater.rollouts.batch import Batch
from headwater.rollouts.sampler import Sampling, TransformersSampler
from headwater.rollouts.served import sampler_for
from headwater.run import StageRun
from headwater.scoring.log_probs import View, score_tokens, top_k_scores
from headwater.stages import distill, sft, warmup
from headwater.types import Message, Problem, Rollout

METHOD = {"steps": 3, "max_new_tokens": 8, "optimizer": {"lr": 1e-3}}
ROLLOUTS = METHOD | {"sequences_per_step": 4, "rollouts_per_problem": 2}
STUDENT = METHOD | {"problems_per_step": 4, "group_size": 2}
CASES = {
    "warmup": (warmup, Warmup.model_validate(ROLLOUTS | {"stored_top_k": 5})),
    "distill": (distill, Distill.model_validate(STUDENT | {"stored_top_k": 5})),
    "distill jsd": (distill, Distill.model_validate(STUDENT | {"stored_top_k": 5, "divergence": "jsd", "beta": 0.3})),
    "distill sampled": (distill, Distill.model_validate(STUDENT | {"divergence": "sampled_token"})),
    "sft": (sft, SFT.model_validate(ROLLOUTS)),
}
VIEW = View(1.0, 16_384, 1024)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PAUSES_S", (0.0, 0.0))


@pytest.fixture
def fake(make_model, problems) -> Iterator[FakeVLLM]:
    teacher = make_model(1, trained=False)
    drawn = TransformersSampler(teacher).sample(problems, Sampling(("teacher", 0), 2, METHOD["max_new_tokens"]))
    with fake_vllm.running(FakeVLLM(teacher, drawn)) as made:
        yield made


def twin(fake: FakeVLLM, directory: Path) -> LanguageModel:
    """The server's model without weights."""
    fake.model.module.config.save_pretrained(directory)
    fake.model.tokenizer.save_pretrained(directory)
    return load_served(fake.model.config, directory, fake.served)


@pytest.mark.parametrize("name", CASES)
def test_gradient_steps_are_those_of_the_teacher_in_process(make_model, problems, fake, tmp_path: Path, name: str):
    stage, settings = CASES[name]
    students, rows, bills = [], [], []
    for where, teacher in {"here": fake.model, "there": twin(fake, tmp_path / "twin")}.items():
        student, run = make_model(0), StageRun(tmp_path / where)
        stage.train(settings, student=student, teacher=teacher, problems=problems, seed=0, run=run)
        students.append(student)
        rows.append([json.loads(line) for line in (tmp_path / where / "metrics.jsonl").read_text().splitlines()])
        bills.append(run.meter.state())
    here, there, start = (torch.cat([p.flatten() for p in m.module.parameters()]) for m in (*students, make_model(0)))
    torch.testing.assert_close(here, there, rtol=0, atol=1e-5)
    assert (here - start).abs().max() > 1e-3
    for ours, theirs in zip(*rows, strict=True):
        assert {**ours, "time": 0} == pytest.approx({**theirs, "time": 0}, rel=1e-4, abs=1e-5)
    for role in bills[0]:
        assert bills[0][role]["tokens"] == bills[1][role]["tokens"]
        assert bills[0][role]["flops"] == bills[1][role]["flops"]
    assert len(fake.asked) == {"sft": 24, "warmup": 24 + 48}.get(name, 3 * 8)


def test_padding_rows_that_are_sent_are_taken_out(fake, tmp_path: Path):
    rows, vocab = fake.model.padded_head.shape[0], fake.model.vocab_size
    fake.normalises_padding, fake.max_logprobs = True, rows
    batch = Batch.of(fake.rollouts[:3])
    ours, theirs = (top_k_scores(m, batch, k, VIEW) for m, k in ((fake.model, vocab), (twin(fake, tmp_path), rows)))
    for row in range(3):
        dense = [
            torch.zeros(len(ids), vocab).scatter_add_(1, ids, logprobs.exp())
            for ids, logprobs in (
                (b.fields["teacher_ids"][row], b.fields["teacher_logprobs"][row]) for b in (ours, theirs)
            )
        ]
        torch.testing.assert_close(dense[0].sum(1), torch.ones(len(dense[0])))
        torch.testing.assert_close(dense[1], dense[0], rtol=0, atol=1e-6)
        assert theirs.fields["teacher_logprobs"][row].isinf().sum(1).tolist() == [rows - vocab] * len(dense[0])


def test_sampling_asks_for_all_that_decides_a_completion(problems, fake, tmp_path: Path):
    sampler, sampling = sampler_for(twin(fake, tmp_path)), Sampling(("teacher", 0), 2, 8, 0.7, 0.9, 5)
    found = sampler.sample(problems, sampling)
    assert [(r.problem_id, r.index, r.completion_ids, r.text, r.finished) for r in found] == [
        (r.problem_id, r.index, r.completion_ids, r.text, r.finished) for r in fake.rollouts
    ]
    sent = fake.asked[0]
    assert sent["stop_token_ids"] == list(fake.model.eos_ids) and sent["ignore_eos"] and sent["return_token_ids"]
    assert [sent[name] for name in ("n", "max_tokens", "temperature", "top_p", "top_k")] == [2, 8, 0.7, 0.9, 5]
    assert sorted(map(int, sent["logit_bias"])) == list(range(fake.model.vocab_size, len(fake.model.padded_head)))
    assert len({body["seed"] for body in fake.asked}) == len(problems)
    fake.rollouts = fake.rollouts[1:]
    with pytest.raises(ValueError, match="sent 1 of 2 completions"):
        sampler.sample(problems, sampling)


def test_faults_of_the_server(fake, tmp_path: Path):
    batch, there = Batch.of(fake.rollouts[:1]), twin(fake, tmp_path)
    wanted = score_tokens(fake.model, batch, VIEW)[0]
    fake.faults += [500, "cut"]
    torch.testing.assert_close(score_tokens(there, batch, VIEW)[0], wanted, rtol=0, atol=1e-5)
    for faults, error, words in (
        ([503, 503, 503], ConnectionError, "failed 3 times .*503.*fault 503"),
        (["cut", "cut", "cut"], ConnectionError, "failed 3 times"),
        ([401], ValueError, "refuses a request .*fault 401"),
        (["short"], ValueError, "scored .* tokens: too few"),
    ):
        fake.faults += faults
        with pytest.raises(error, match=words):
            score_tokens(there, batch, VIEW)
        assert not fake.faults
    with pytest.raises(ValueError, match=r"max allowed: 20"):
        top_k_scores(there, batch, 21, VIEW)
    with pytest.raises(ValueError, match=r"temperature 1, the stage's is 0\.7"):
        score_tokens(there, batch, View(0.7, 16_384, 1024))
    for served, error, words in (
        (Served(url=fake.url, model="large"), ValueError, "The model `large` does not exist"),
        (Served(url="http://127.0.0.1:9/v1"), ConnectionError, "failed 3 times"),
    ):
        with pytest.raises(error, match=words):
            score_tokens(replace(there, served=served), batch, VIEW)


def served_recipe(root: Path, url: str, **execution: Any) -> Path:
    """The miniature study with a given teacher, whose weights are gone from its source."""
    recipe = tomllib.loads(miniature.write(root).read_text())
    del recipe["stages"]["teacher_rl"]
    for stage in ("warmup", "distill"):
        recipe["stages"][stage]["stored_top_k"] = 8
    recipe["arms"] = {"direct": recipe["arms"]["direct"], "bridge": {"preset": "given"}}
    recipe["comparisons"] = recipe["comparisons"][:1]
    recipe["execution"] |= {"teacher": {"url": url} | execution}
    (root / "served.toml").write_text(tomli_w.dumps(recipe))
    return root / "served.toml"


def test_a_study_whose_teacher_is_served(tmp_path: Path):
    miniature.write(tmp_path)
    config = load_recipe(tmp_path / "recipe.toml").models["teacher"]
    model = load_model(config, tmp_path / "teacher")

    def draw(body: dict[str, Any]) -> list[Rollout]:
        sampling = Sampling(("any", *body["prompt"]), body["n"], body["max_tokens"])
        return TransformersSampler(model).complete([Problem((Message("user", "?"),))], [body["prompt"]], sampling)

    with fake_vllm.running(FakeVLLM(model, draw=draw)) as fake:
        recipe = served_recipe(tmp_path, fake.url)
        (tmp_path / "teacher" / "model.safetensors").unlink()
        command = ["run", str(recipe), "--out", str(tmp_path / "out"), "--store", str(tmp_path / "store")]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    keys = results["arms"]["bridge"]["seeds"]["0"]["stages"]
    assert results["arms"]["bridge"]["seeds"]["0"]["cost"]["tokens"]["scored"] > 0
    outcomes = [json.loads((tmp_path / "out" / "nodes" / key / "done.json").read_text()) for key in keys]
    assert [o["execution"]["teacher"]["url"] for o in outcomes] == [fake.url] * 2
    direct = results["arms"]["direct"]["seeds"]["0"]["stages"][0]
    assert json.loads((tmp_path / "out" / "nodes" / direct / "done.json").read_text())["execution"]["teacher"] is None
    assert results["models"]["teacher"]["evals"]["0"]["rows"]["num_problems"] == 4


def test_the_checkup_asks_the_server_before_a_weight_is_loaded(tmp_path: Path):
    miniature.write(tmp_path)
    model = load_model(load_recipe(tmp_path / "recipe.toml").models["teacher"], tmp_path / "teacher")

    def finding(url: str, **execution: Any) -> tuple[str, str]:
        _, findings = checkup(load_recipe(served_recipe(tmp_path, url, **execution)))
        (found,) = [f for f in findings if f.name == "teacher: server"]
        return found.level, found.seen

    with fake_vllm.running(FakeVLLM(model)) as fake:
        assert finding(fake.url) == ("ok", f"{fake.url} answers, with 8 log-probs a token")
        assert "`large` does not exist" in finding(fake.url, model="large")[1]
        fake.max_logprobs = 5
        assert "start it with --max-logprobs 8" in finding(fake.url)[1]
        fake.shifted_ids = 1
        assert "other ids for a text" in finding(fake.url)[1]
    level, seen = finding(fake.url)
    assert level == "error" and "failed 3 times" in seen


@pytest.mark.parametrize(
    ("sets", "part"),
    [
        (["arms.bridge.teacher=rl"], "needs [stages.teacher_rl]"),
        (["stages.warmup.stored_top_k=0"], "[stages.warmup]: a served teacher gives top-k log-probs"),
        (["stages.distill.temperature=0.7"], "set temperature = 1"),
        (["stages.distill.alignment=spans"], "set alignment = 'tokens'"),
        (["arms.bridge.teacher_model=student"], "one model that only teaches"),
        (["execution.teacher.url=host:8000"], "execution.teacher.url"),
    ],
)
def test_recipes_that_a_served_teacher_cannot_serve(tmp_path: Path, sets: list[str], part: str):
    path = served_recipe(tmp_path, "http://127.0.0.1:9/v1")
    with pytest.raises(ValueError) as error:
        load_recipe(path, sets)
    assert part in str(error.value)


def test_a_teacher_that_is_trained_here_is_not_served(tmp_path: Path):
    with pytest.raises(ValueError, match="it is frozen, so teacher = 'raw' or 'given'"):
        load_recipe(miniature.write(tmp_path), ["execution.teacher.url=http://127.0.0.1:9/v1"])
