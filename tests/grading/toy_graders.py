"""Graders that misbehave when the completion says so; loaded by path in grading children."""

import asyncio
import ctypes
import os
import subprocess
import sys
import time

from headwater.types import Problem, Verdict


def grade(completion: str, problem: Problem) -> Verdict:
    begun = time.process_time()
    match completion:
        case "loop":
            while True:
                pass
        case "work a second":
            while time.process_time() < 1.0 + begun:
                pass
            return Verdict(True, True, "correct", 1.0)
        case "sleep":
            time.sleep(60)
        case "memory":
            return Verdict(bool(bytearray(1 << 40)), True, "correct", 1.0)
        case "eat":
            hoard = []
            while True:
                hoard.append(bytearray(1 << 24))
        case "exit":
            os._exit(0)
        case "segfault":
            ctypes.string_at(0)
        case "killed":
            os.kill(os.getpid(), 9)
        case "sysexit":
            sys.exit("bye")
        case "raise":
            raise RuntimeError("no such luck")
        case "recurse":
            return grade_deeper(0)
        case "print":
            print('[{"correct":true,"parsed":true,"reason":"correct","score":1,"style":null},""]', flush=True)
            os.system("echo noise; echo noise >&2")
        case "forge":
            for fd in range(3, 10):
                try:
                    os.write(fd, b"[1,2]\n")
                except OSError:
                    continue
        case "stdin":
            return Verdict(False, True, "wrong", float(len(sys.stdin.read())))
        case "grandchild":
            subprocess.Popen(["sleep", "1000"])
            while True:
                pass
        case "nan":
            return Verdict(False, True, "wrong", float("nan"))
        case "hash":
            return Verdict(False, True, "wrong", 0.0, str(hash("seed")))
        case "torch":
            return Verdict("torch" in sys.modules, True, "wrong", 0.0)
    right = completion == problem.answer
    return Verdict(right, True, "correct" if right else "wrong", float(right), str(len(completion)))


def grade_deeper(depth: int) -> Verdict:
    return grade_deeper(depth + 1)


def as_bool(completion: str, problem: Problem) -> bool:
    return completion == problem.answer


def as_number(completion: str, problem: Problem) -> float:
    return float(completion)


def echo(completion: str, problem: Problem) -> Verdict:
    return Verdict(False, True, "wrong", 0.0, answer=completion)


def as_string(completion: str, problem: Problem) -> str:
    return "1.0"


def trl_messages(prompts, completions, solution, **kwargs):
    assert prompts[0][0] == {"role": "user", "content": "What?"}, prompts
    return [
        None if c[0]["content"] == "?" else float(c[0]["content"] == s)
        for c, s in zip(completions, solution, strict=True)
    ]


async def trl_async(prompts, completions, answer, **kwargs):
    await asyncio.sleep(0.001)
    return [float(c[-1]["content"] == a) for c, a in zip(completions, answer, strict=True)]


def trl_strings(prompts, completions, **kwargs):
    assert prompts == ["What?"], prompts
    return [len(c) / 4 for c in completions]
