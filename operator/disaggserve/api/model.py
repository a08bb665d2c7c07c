"""The base of every API type: frozen, strict, camelCase in JSON, with rules that Python and the API server both enforce.

A `Rule` is written once, as CEL and as a Python predicate side by side; `crd.py` prints the CEL, pydantic runs the
predicate, and a contract test sends the same generated documents to both.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


@dataclass(frozen=True)
class Rule:
    """One rule over a whole object. `field` is the path below the object that the message is about (may be empty)."""

    cel: str
    message: str
    holds: Callable[[Any], bool]
    field: str = ""


def camel(name: str) -> str:
    """`max_surge_gpus` → `maxSurgeGPUs`: the API's spelling of a Python field."""
    head, *tail = name.split("_")
    words = {"gpu": "GPU", "gpus": "GPUs", "slo": "SLO"}
    return head + "".join(words.get(word, word.capitalize()) for word in tail)


class ApiModel(BaseModel):
    """Frozen and strict; unknown fields are faults, never ignored."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        alias_generator=camel,
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )
    rules: ClassVar[tuple[Rule, ...]] = ()

    @model_validator(mode="after")
    def _keep_rules(self) -> Self:
        for rule in self.rules:
            if not rule.holds(self):
                raise PydanticCustomError("rule", "{message}", {"message": rule.message, "field": rule.field})
        return self


DURATION_PATTERN = r"^[0-9]{1,9}(\.[0-9]{1,6})?(ms|s|m|h)$"
_UNITS_S = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def seconds(duration: str) -> float:
    """Seconds of a duration with a unit: `250ms`, `30s`, `10m`, `6h`. Raises ValueError on anything else."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h)", duration)
    if match is None:
        raise ValueError(f"{duration!r} is no duration: write a number and ms, s, m or h, like 250ms")
    return float(match[1]) * _UNITS_S[match[2]]
