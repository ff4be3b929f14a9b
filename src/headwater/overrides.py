"""Plain trees of settings: merging, dotted overrides, and what a schema finds wrong with one in words."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the leaves of `changes` in place of its own."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def override(raw: Mapping[str, Any], text: str) -> dict[str, Any]:
    """`raw` changed as `a.b=VALUE` says; VALUE is TOML, and a bare word a text. ValueError for anything else."""
    key, equals, right = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ValueError(f"--set {text!r}: write key=value, for example --set pool.labels=64")
    try:
        value = tomllib.loads(f"value = {right}")["value"]
    except tomllib.TOMLDecodeError:
        value = right
    change: dict[str, Any] = {parts[-1]: value}
    for part in reversed(parts[:-1]):
        change = {part: change}
    return merge(raw, change)


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One line per problem: where, what is wrong, what was given, which keys there are."""
    schema = model.model_json_schema()
    lines = []
    for item in error.errors():
        places = list(_walk(schema, item["loc"]))
        where = ".".join(name for name, _ in places) or "recipe"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = _unknown(*places[-1])
        if item["type"] == "union_tag_not_found":
            message = f"{item['ctx']['discriminator']} is missing"  # pyright: ignore -- this error has one
        shown = repr(item.get("input"))
        given = f" (given: {shown})" if item["type"] != "missing" and len(shown) < 80 else ""
        lines.append(f"  {where}: {message}{given}")
    return "\n".join(lines)


def _unknown(key: str, allowed: Sequence[str]) -> str:
    near = get_close_matches(key, allowed, n=1)
    return f"unknown key; {f'did you mean {near[0]!r}? ' if near else ''}the keys here are {', '.join(sorted(allowed))}"


def _walk(schema: Mapping[str, Any], place: Sequence[int | str]) -> Iterator[tuple[str, list[str]]]:
    """Every step of a pydantic error's location with the keys allowed there; tags of unions are no steps."""
    node: Mapping[str, Any] = schema
    for part in place:
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
        tagged = node.get("discriminator", {}).get("mapping", {})
        if part in tagged:
            node = {"$ref": tagged[part]}
            continue
        fields = node.get("properties", {})
        yield str(part), list(fields)
        others = [*node.get("patternProperties", {}).values(), node.get("additionalProperties"), node.get("items")]
        below = [fields.get(part), *others]
        node = next((b for b in below if isinstance(b, Mapping)), {})
