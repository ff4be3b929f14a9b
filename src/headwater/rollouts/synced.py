"""Sampling from the model under training by a vLLM server, whose weights are shown to be the trainer's."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from headwater.config import ServedStudent
from headwater.mesh import Mesh
from headwater.models.in_vllm import headwater_vllm
from headwater.models.language_model import LanguageModel
from headwater.models.server import ask
from headwater.rollouts.sampler import Sampling
from headwater.rollouts.served import ServedSampler
from headwater.types import Problem, Rollout

BESIDE = str(Path(headwater_vllm.__file__).parent)
"""What goes on the server's PYTHONPATH."""
NEEDED = ["--logprobs-mode", "processed_logprobs", "--worker-extension-cls", "headwater_vllm.Weights"]
BOUND = 'exec 3<&0; { read _ <&3; trap "" TERM; kill 0; sleep 15; kill -9 0; } & exec "$@" </dev/null 3<&-'
"""Shell: a command whose process group ends when the input does, whatever ended the one that holds it open."""


class SyncedSampler:
    """A server that `load` gives the weights of the model that is trained here.

    The random numbers are the server's (`ServedSampler`); log-probs are those of the distribution that was drawn from.
    """

    prefilled = decoded = None

    def __init__(self, model: LanguageModel, mesh: Mesh, served: ServedStudent, directory: Path) -> None:
        self.model, self.mesh, self.served = model, mesh, served
        self.directory = Path(served.directory or directory).resolve() / f".vllm-{directory.name}"
        self.label, self.version = "", 0

    def load(self, weights: object, version: int) -> None:
        """Hand the weights over, empty the prefix cache, and compare the sums of what the server multiplies by.

        Raises ValueError, naming layers, where these are not the weights of this version here, and as `ask` does.
        """
        self.version, self.label = version, f"{version} of {uuid.uuid4()}"
        if self.mesh.is_writer:
            try:
                self.model.module.save_pretrained(self.directory)
                call(self.served, "headwater_load", directory=str(self.directory), version=self.label)
            finally:
                shutil.rmtree(self.directory, ignore_errors=True)
            ask(self.served, "/reset_prefix_cache", {}, _was_reset)
            found = call(self.served, "headwater_status", sums="yes")
            ours, theirs = headwater_vllm.checksums(self.model.module.named_parameters()), found["sums"]
            if apart := sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n)):
                raise ValueError(
                    f"the server at {self.served.url} does not have the weights of version {version} that it was sent: "
                    f"the checksums of {len(apart)} of {len(ours)} layers differ ('' = outside of layers), in "
                    f"{apart[0]!r} {theirs.get(apart[0])} there and {ours.get(apart[0])} here. It must serve this "
                    f"architecture in {self.model.config.dtype}, not quantised"
                )
            self._check_version(found)
        self.mesh.barrier()

    def sample(self, problems: Sequence[Problem], sampling: Sampling) -> list[Rollout]:
        """As `ServedSampler.sample`; ValueError when other weights were there at the end."""
        asked = ServedSampler(self.model, self.mesh, self.served, self.version, scored=True)
        rollouts = asked.sample(problems, sampling)
        if self.mesh.is_writer:
            self._check_version(call(self.served, "headwater_status"))
        return rollouts

    def _check_version(self, found: dict[str, Any]) -> None:
        if found["version"] != self.label:
            raise ValueError(
                f"the server at {self.served.url} has weights of version {found['version']}, not {self.label}: it "
                "started anew, or another run uses it too; give each its own"
            )


def call(served: ServedStudent, method: str, **arguments: str) -> dict[str, Any]:
    """What a method of `headwater_vllm.Weights` says; ValueError for its error, more than one worker, and as `ask`."""
    found = ask(served, "/collective_rpc", {"method": method, "kwargs": arguments}, lambda answer: answer["results"])
    error = found[0].get("error") if len(found) == 1 else f"it has {len(found)} workers; start it without parallelism"
    if error:
        raise ValueError(f"{method} failed in the server at {served.url}: {error}")
    return found[0]


def _was_reset(answer: dict[str, Any]) -> None:
    if not answer["success"]:
        raise ConnectionError("the prefix cache is in use")  # `ask` tries again


def check_server(served: ServedStudent, dtype: str) -> None:
    """ValueError where a server cannot take weights of a model in `dtype`, would send other log-probs, or is older than
    what this was checked with."""
    needed = {"dtype": dtype, "logprobs_mode": "processed_logprobs"}
    try:
        found = call(served, "headwater_status")
        wrong = [f"its {name} is {found[name]}" for name, wanted in needed.items() if found[name] != wanted]
        if wrong or [int(part) for part in found["vllm"].split(".")[:2]] < [0, 32]:
            raise ValueError(f"{', '.join([*wrong, 'its vLLM is ' + found['vllm']])}")
    except (ValueError, ConnectionError) as error:
        raise ValueError(
            f"[execution.sampler] {served.url}: {error}. It takes vLLM 0.32 or newer, started with "
            f"VLLM_SERVER_DEV_MODE=1 PYTHONPATH={BESIDE} vllm serve MODEL --dtype {dtype} {' '.join(NEEDED)}"
        ) from error


@contextmanager
def sampling_server(
    settings: ServedStudent | None, model: LanguageModel, mesh: Mesh, log: Path
) -> Iterator[ServedStudent | None]:
    """The settings with the URL of a server, started where they name an interpreter and ended with the block, or with
    this process; None for None.

    Raises ValueError as `check_server` does and, in the words of its log, when the server does not come up.
    """
    if settings is None or settings.url:
        yield settings
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = mesh.collect(str(free.getsockname()[1]))[0]
    served = settings.model_copy(update={"url": f"http://127.0.0.1:{port}/v1"})
    if not mesh.is_writer:
        yield served
        return
    command = [settings.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model.directory)]
    command += ["--host", "127.0.0.1", "--port", port, "--dtype", model.config.dtype, *NEEDED]
    # Random weights: the first sync replaces them, and if it did not, nobody could take them for the student's.
    command += ["--load-format", "dummy", *settings.arguments]
    environment = os.environ | {"PYTHONPATH": BESIDE, "VLLM_SERVER_DEV_MODE": "1"}
    with log.open("wb") as file:
        pipes = {"stdin": subprocess.PIPE, "stdout": file, "stderr": file}
        bound = ["sh", "-c", BOUND, "sh", *command]
        process = subprocess.Popen(bound, env=environment, start_new_session=True, **pipes)
    assert process.stdin is not None
    try:
        _wait(process, served, log)
        check_server(served, model.config.dtype)
        yield served
    finally:
        process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(process: subprocess.Popen[Any], served: ServedStudent, log: Path) -> None:
    until = time.monotonic() + served.timeout_s
    while process.poll() is None and time.monotonic() < until:
        try:
            return urlopen(f"{served.root}/health", timeout=10).close()
        except OSError:
            time.sleep(0.5)
    lines = log.read_text(errors="replace").splitlines()
    said = "\n".join([line for line in lines if "Error: " in line][:1] or lines[-15:])  # the first has the reason
    raise ValueError(
        f"[execution.sampler] python = {served.python!r} did not serve (status {process.poll()}, timeout_s = "
        f"{served.timeout_s}); from {log}:\n{said}"
    )
