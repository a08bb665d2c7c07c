"""Generates the CustomResourceDefinition from the pydantic models; raises on what a structural schema cannot say.

pydantic's JSON schema is no CRD schema (REFERENCE: `$ref`, `anyOf null`, `const`, `prefixItems`, … are refused or silently
changed by the API server), so `_node` translates what is known and refuses everything else.
"""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import BaseModel

from disaggserve.api import manifest
from disaggserve.api.model import ApiModel
from disaggserve.api.spec import Spec
from disaggserve.api.status import Status

_KEPT = (
    "description",
    "type",
    "enum",
    "pattern",
    "minLength",
    "maxLength",
    "minimum",
    "maximum",
    "minItems",
    "maxItems",
    "default",
)
_IGNORED = ("title", "examples")


class CannotExpress(TypeError):
    """A model uses something that a structural schema cannot say."""


def _node(schema: dict[str, Any], defs: dict[str, Any], at: str) -> dict[str, Any]:
    if "$ref" in schema:
        target = defs[schema["$ref"].rsplit("/", 1)[1]]
        return _node(target | {k: v for k, v in schema.items() if k != "$ref"}, defs, at)
    if "anyOf" in schema:
        variants = [v for v in schema["anyOf"] if v != {"type": "null"}]
        if len(variants) != 1:
            raise CannotExpress(f"{at}: a union of {len(variants)} types")
        rest = {k: v for k, v in schema.items() if k not in ("anyOf", "default")}
        return _node(variants[0] | rest, defs, at)
    out: dict[str, Any] = {}
    for key, value in schema.items():
        match key:
            case _ if key in _KEPT:
                out[key] = value
            case _ if key in _IGNORED:
                pass
            case "const":
                out["enum"] = [value]
            case "exclusiveMinimum" | "exclusiveMaximum":
                out[key.replace("exclusiveM", "m")] = value
                out[key] = True
            case "properties":
                out["properties"] = {name: _node(sub, defs, f"{at}.{name}") for name, sub in value.items()}
            case "required":
                out["required"] = value
            case "additionalProperties" if value is False:
                pass  # the server prunes or refuses unknown fields by itself
            case "additionalProperties" if isinstance(value, dict):
                out["additionalProperties"] = _node(value, defs, f"{at}.*")
            case "propertyNames":
                pass  # lengths of keys cannot be said; Python checks them, and maxProperties bounds the map
            case "maxProperties":
                out[key] = value
            case "items":
                out["items"] = _node(value, defs, f"{at}[]")
                out["items"].pop("description", None)  # the list's own says it
            case _:
                raise CannotExpress(f"{at}: {key}")
    kind = out.get("type")
    if kind not in ("object", "array", "string", "integer", "number", "boolean"):
        raise CannotExpress(f"{at}: type {kind!r}")
    if kind == "array" and "items" not in out:
        raise CannotExpress(f"{at}: a list without an item type")
    if kind == "array" and "maxItems" not in out:
        raise CannotExpress(f"{at}: a list without maxItems (CEL cost)")
    return out


def _annotate(model: type[BaseModel], node: dict[str, Any]) -> None:
    """Adds rules and defaults of nested objects, which pydantic's schema does not carry."""
    rules = [
        {"rule": r.cel, "message": r.message} | ({"fieldPath": f".{r.field}"} if r.field else {})
        for r in (model.rules if issubclass(model, ApiModel) else ())
    ]
    if rules:
        node["x-kubernetes-validations"] = rules
    for name, field in model.model_fields.items():
        child = node["properties"][field.alias or name]
        if field.default_factory is not None and child.get("type") == "object":
            # Whole, not {}: rules are checked against a default before its own defaults are filled in.
            value = field.get_default(call_default_factory=True)
            child["default"] = (
                value.model_dump(mode="json", exclude_none=True) if isinstance(value, BaseModel) else value
            )
        for inner in _models(field.annotation):
            _annotate(inner, child["items"] if child["type"] == "array" else child)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for a in getattr(annotation, "__args__", ()) for m in _models(a)]


def schema(model: type[ApiModel]) -> dict[str, Any]:
    """The structural schema of one model. Raises CannotExpress."""
    raw = model.model_json_schema(by_alias=True)
    node = _node({k: v for k, v in raw.items() if k != "$defs"}, raw.get("$defs", {}), model.__name__.lower())
    _annotate(model, node)
    return node


_COLUMNS = (
    ("Model", "string", ".spec.model.id", "The model"),
    ("Phase", "string", ".status.phase", "Derived from conditions; for people only"),
    ("Prefill", "string", ".status.plan.prefill", "Prefill instances and shape"),
    ("Decode", "string", ".status.plan.decode", "Decode instances and shape"),
    ("Mixed", "string", ".status.plan.mixed", "Instances that do both, their shape and chunk"),
    ("GPUs", "integer", ".status.plan.gpus", "GPUs of the plan"),
    (
        "Attainment",
        "number",
        ".status.plan.predicted.attainment",
        "Predicted share of requests that meet the promise",
    ),
    ("Age", "date", ".metadata.creationTimestamp", "Age"),
)


def crd() -> dict[str, Any]:
    """The CustomResourceDefinition as JSON values."""
    spec, status = schema(Spec), schema(Status)
    spec["description"] = "Which model, which latency promise, which traffic."
    status["description"] = "What the operator decided and how far it is."
    status["properties"]["conditions"] |= {
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["type"],
    }
    root = {
        "type": "object",
        "description": "A model served under a latency promise: the operator works out GPUs, shapes and nodes, and keeps them right.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": status,
        },
        "x-kubernetes-validations": [
            {
                "rule": f"self.metadata.name.size() <= {manifest.NAME_LENGTH} && self.metadata.name.matches('{manifest.NAME_PATTERN}')",
                "message": manifest.NAME_MESSAGE,
            }
        ],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{manifest.PLURAL}.{manifest.GROUP}"},
        "spec": {
            "group": manifest.GROUP,
            "names": {
                "kind": manifest.KIND,
                "plural": manifest.PLURAL,
                "singular": manifest.KIND.lower(),
                "shortNames": ["dsv"],
                "categories": ["all"],
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": manifest.VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [
                        {"name": n, "type": t, "jsonPath": p, "description": d} for n, t, p, d in _COLUMNS
                    ],
                    "schema": {"openAPIV3Schema": root},
                }
            ],
        },
    }


class _Dumper(yaml.SafeDumper):
    """Repeats values instead of YAML anchors, which kubectl reads but people do not."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def text() -> str:
    """The CRD as YAML, the same bytes every time."""
    head = "# Generated by `disaggserve crd` from operator/disaggserve/api; do not edit.\n"
    return head + yaml.dump(
        crd(), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100_000, allow_unicode=True
    )
