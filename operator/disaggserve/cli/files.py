"""Reads what people hand to the commands; what cannot be read is one sentence."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from disaggserve.api import manifest
from disaggserve.api.errors import InvalidInput
from disaggserve.api.manifest import Manifest


def text(path: Path) -> str:
    """The text of a file; `-` is standard input."""
    if str(path) == "-":
        return sys.stdin.read()
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: cannot be read ({error}); name a readable text file") from None


def one(path: Path) -> Manifest:
    """The only `DisaggServe` of a file."""
    found = manifest.load(text(path))
    if len(found) != 1:
        raise InvalidInput(f"{path}: holds {len(found)} {manifest.KIND} resources; plan one at a time")
    return found[0]


def objects(path: Path) -> list[dict[str, Any]]:
    """Kubernetes objects as `kubectl get … -o yaml` or `-o json` prints them, lists opened."""
    content = text(path)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        documents = (
            [json.loads(content)]
            if content.lstrip().startswith("{")
            else [d for d in yaml.load_all(content, Loader=loader) if d]  # noqa: S506: both are safe loaders
        )
    except (ValueError, yaml.YAMLError) as error:
        raise InvalidInput(
            f"{path}: is neither YAML nor JSON: {' '.join(str(error).split())[:200]}"
        ) from None
    out: list[dict[str, Any]] = []
    for document in documents:
        if not isinstance(document, dict) or "kind" not in document:
            raise InvalidInput(
                f"{path}: is no Kubernetes object; give what `kubectl get nodes,pods -A -o yaml` prints"
            )
        listed = document["kind"].endswith("List")
        items = document.get("items") or []
        kind = document["kind"].removesuffix("List")
        out += (
            [{"kind": kind, **item} if kind and "kind" not in item else item for item in items]
            if listed
            else [document]
        )
    return out
