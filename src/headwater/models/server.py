"""A client of vLLM's server (the protocol of vLLM 0.32): JSON over HTTP, tried again where that may help."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from headwater.config import Served

T = TypeVar("T")
PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Before each new try of a request that failed by no fault of its own."""


def ask(served: Served, path: str, body: dict[str, Any], read: Callable[[Any], T]) -> T:
    """What `read` finds in the answer to a POST of `body`; a `path` with a leading / is under the URL's root.
    $VLLM_API_KEY goes with it where that is set.

    Raises ValueError, with its own words, for what the server refuses, and for an answer that is not vLLM's;
    ConnectionError when it is out of reach, breaks off or fails in every try.
    """
    url = f"{served.root}{path}" if path.startswith("/") else f"{served.url.rstrip('/')}/{path}"
    headers, reason = {"Content-Type": "application/json"}, ""
    if key := os.environ.get("VLLM_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = Request(url, json.dumps({"model": served.model, **body}).encode(), headers)
    for pause in (0.0, *PAUSES_S):
        time.sleep(pause)
        try:
            with urlopen(request, timeout=served.timeout_s) as answer:
                found = json.load(answer)
            return read(found)
        except HTTPError as error:
            reason = f"{error.code}: {error.read().decode(errors='replace')[:1000]}"
            if error.code < 500 and error.code not in (408, 429):
                raise ValueError(f"{url} refuses a request ({reason})") from None
        except (OSError, HTTPException, json.JSONDecodeError, UnicodeDecodeError) as error:
            reason = f"{type(error).__name__}: {error}"
        except (LookupError, TypeError) as error:
            raise ValueError(f"{url} does not answer as vLLM 0.32 does ({type(error).__name__}: {error})") from error
    raise ConnectionError(
        f"{url} failed {len(PAUSES_S) + 1} times ({reason}): see to the server, then start this again"
    )


def complete(served: Served, bodies: Sequence[dict[str, Any]], read: Callable[[int, Any], T]) -> list[T]:
    """What `read(i, choices)` finds in the completions of `bodies[i]`; `served.requests` are under way at once."""

    def one(i: int) -> T:
        return ask(served, "completions", bodies[i], lambda answer: read(i, answer["choices"]))

    with ThreadPoolExecutor(served.requests) as pool:
        return list(pool.map(one, range(len(bodies))))
