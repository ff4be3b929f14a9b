"""A server that speaks as vLLM 0.32 does, from a tiny model in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from types import SimpleNamespace
from typing import Any

import torch

from headwater.config import Served
from headwater.models import template
from headwater.models.in_vllm.headwater_vllm import Weights
from headwater.models.language_model import LanguageModel
from headwater.types import Rollout


class FakeWorker(Weights):
    """The part of vLLM's worker that weights are handed to; with `keeps` it says yes and does nothing."""

    def __init__(self, model: LanguageModel) -> None:
        self.model_runner = SimpleNamespace(get_model=lambda: model.module)
        self.model_config = SimpleNamespace(dtype=torch.float32, logprobs_mode="processed_logprobs")
        self.keeps, self.resets, self.resettable = False, 0, True

    @torch.no_grad()
    def reload_weights(self, weights_iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        for name, weight in weights_iterator:
            if not self.keeps:
                self.model_runner.get_model().get_parameter(name).copy_(weight)


@dataclass
class FakeVLLM:
    """`rollouts` are what it samples for their prompts, unless `draw` does it.

    `faults` are answered first, one a completion: a status, "cut" (the connection ends within the body) or "short" (a
    token without scores).
    """

    model: LanguageModel
    rollouts: list[Rollout] = field(default_factory=list)
    draw: Callable[[dict[str, Any]], list[Rollout]] | None = None
    normalises_padding: bool = False
    max_logprobs: int = 20
    shifted_ids: int = 0
    faults: list[int | str] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""
    workers: list[FakeWorker] = field(default_factory=list)
    lock: Any = field(default_factory=Lock)

    @property
    def served(self) -> Served:
        return Served(url=self.url, timeout_s=30.0, requests=3)

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if body["model"] not in ("", "tiny"):
            return failure(404, f"The model `{body['model']}` does not exist.")
        if path == "/tokenize":
            assert body["add_special_tokens"] is False
            ids = [i + self.shifted_ids for i in template.plain(self.model.tokenizer, body["prompt"])]
            return 200, {"count": len(ids), "max_model_len": 4096, "tokens": ids, "token_strs": None}
        if path == "/reset_prefix_cache":
            self.workers[0].resets += 1
            return 200, {"success": self.workers[0].resettable}
        if path == "/collective_rpc":
            return 200, {"results": [getattr(worker, body["method"])(**body["kwargs"]) for worker in self.workers]}
        assert path == "/v1/completions"
        self.asked.append(body)
        if (k := body.get("prompt_logprobs")) is not None:
            if k > self.max_logprobs:
                return failure(400, f"Requested prompt logprobs of {k}, greater than max allowed: {self.max_logprobs}")
            return 200, {"choices": [{"index": 0, "text": "?", "prompt_logprobs": self.scores(body["prompt"], k)}]}
        mine = [r for r in self.rollouts if r.prompt_ids == body["prompt"]]
        rows = self.draw(body) if self.draw else mine[: body["n"]]
        return 200, {
            "choices": [
                {"index": i, "text": r.text, "token_ids": r.completion_ids}
                | ({"logprobs": {"token_logprobs": r.sampler_logprobs}} if "logprobs" in body else {})
                for i, r in enumerate(rows)
            ]
        }

    @torch.no_grad()
    def scores(self, ids: list[int], k: int) -> list[dict[str, Any] | None]:
        logits = self.model.module(input_ids=torch.tensor([ids])).logits[0]
        if not self.normalises_padding:
            logits[:, self.model.vocab_size :] = -torch.inf
        logprobs = logits.log_softmax(-1).clamp(min=-9999.0)
        places: list[dict[str, Any] | None] = [None]
        for token, row in zip(ids[1:], logprobs, strict=False):
            place = {token: {"logprob": float(row[token]), "rank": int((row >= row[token]).sum())}}
            top = row.topk(k)
            for rank, (i, value) in enumerate(zip(top.indices.tolist(), top.values.tolist(), strict=True), 1):
                place[i] = {"logprob": value, "rank": rank}
            places.append({str(i): {**entry, "decoded_token": "?"} for i, entry in place.items()})
        return places


def failure(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"message": message, "code": status}}


@contextmanager
def running(fake: FakeVLLM) -> Iterator[FakeVLLM]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer: Any
            with fake.lock:
                fault = fake.faults.pop(0) if fake.faults and self.path == "/v1/completions" else None
                status, answer = fake.answer(self.path, body)
            if isinstance(fault, int):
                status, answer = failure(fault, f"fault {fault}")
            if fault == "short":
                answer["choices"][0]["prompt_logprobs"].pop()
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)

        def log_message(self, format: str, *args: object) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
