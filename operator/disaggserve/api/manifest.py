"""Reads `DisaggServe` documents strictly, as the API server does: every fault is named with its field."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import ValidationError

from disaggserve.api.errors import Fault, InvalidManifest
from disaggserve.api.spec import Spec

GROUP = "disaggserve.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "DisaggServe"
PLURAL = "disaggserves"

NAME_PATTERN = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
NAME_LENGTH = 36
NAME_MESSAGE = (
    f"metadata.name must be at most {NAME_LENGTH} characters of a-z, 0-9 and -, start with a letter and not end with -: "
    "pods and the service are named after it"
)


@dataclass(frozen=True)
class Manifest:
    """One validated document."""

    name: str
    namespace: str
    spec: Spec


def _as_stored(value: Any) -> Any:
    """What the API server makes of a value: explicit nulls are dropped (no field of ours is nullable), `1.0` is the integer 1."""
    if isinstance(value, dict):
        return {k: _as_stored(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_as_stored(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _path(loc: Iterable[str | int]) -> str:
    path = "spec"
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path


_WORDS = {
    "missing": "is required and missing",
    "extra_forbidden": "is an unknown field; check its spelling, `kubectl explain disaggserve.spec` lists them",
}


def _fault(error: Any) -> Fault:
    field = _path(error["loc"])
    context = error.get("ctx") or {}
    match error["type"]:
        case "rule":
            return Fault(field + (f".{context['field']}" if context["field"] else ""), context["message"])
        case "missing" | "extra_forbidden" as kind:
            return Fault(field, _WORDS[kind])
        case "string_pattern_mismatch" if "ms|s|m|h" in context.get("pattern", ""):
            return Fault(
                field,
                f"{error['input']!r} is no duration; write a number and a unit (ms, s, m or h), like 250ms",
            )
        case "string_type" if isinstance(error["input"], int | float):
            return Fault(
                field, f"must be a string, not the number {error['input']}; a duration has a unit, like 250ms"
            )
        case _:
            shown = json.dumps(error["input"], default=str)[:80]
            return Fault(field, f"{error['msg'][0].lower()}{error['msg'][1:]}, not {shown}")


def parse_spec(value: Any) -> Spec:
    """The spec of one resource, as JSON values. Raises InvalidManifest with every fault."""
    try:
        text = json.dumps(_as_stored(value), allow_nan=False)
    except (ValueError, TypeError) as error:
        raise InvalidManifest(
            [Fault("spec", f"is no JSON value ({error}); numbers must be finite, dates quoted")]
        ) from None
    try:
        return Spec.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise InvalidManifest([_fault(e) for e in error.errors(include_url=False)]) from None


def parse(document: Any) -> Manifest:
    """One document as YAML or JSON gives it. Raises InvalidManifest with every fault."""
    if not isinstance(document, dict):
        raise InvalidManifest([Fault("document", f"must be a {KIND} object, not {type(document).__name__}")])
    faults = []
    if document.get("apiVersion") != API_VERSION:
        faults.append(Fault("apiVersion", f"must be {API_VERSION}, not {document.get('apiVersion')!r}"))
    if document.get("kind") != KIND:
        faults.append(Fault("kind", f"must be {KIND}, not {document.get('kind')!r}"))
    metadata = document.get("metadata") or {}
    name = metadata.get("name", "")
    if not (isinstance(name, str) and re.fullmatch(NAME_PATTERN, name) and len(name) <= NAME_LENGTH):
        faults.append(Fault("metadata.name", NAME_MESSAGE))
    faults += [
        Fault(str(k), "is an unknown field; a resource has apiVersion, kind, metadata and spec")
        for k in document
        if k not in ("apiVersion", "kind", "metadata", "spec", "status")
    ]
    if faults:
        raise InvalidManifest(faults)
    if document.get("spec") is None:
        raise InvalidManifest([Fault("spec", "is required and missing")])
    return Manifest(
        name=name, namespace=metadata.get("namespace") or "default", spec=parse_spec(document["spec"])
    )


def load(text: str) -> list[Manifest]:
    """Every `DisaggServe` in a YAML or JSON text (several documents may follow each other). Raises InvalidManifest."""
    try:
        documents = [d for d in yaml.safe_load_all(text) if d is not None]
    except yaml.YAMLError as error:
        raise InvalidManifest(
            [Fault("document", "is neither YAML nor JSON: " + " ".join(str(error).split()))]
        ) from None
    if not documents:
        raise InvalidManifest([Fault("document", f"is empty; it should hold a {KIND}")])
    return [parse(d) for d in documents]
