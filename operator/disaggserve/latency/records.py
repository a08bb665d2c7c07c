"""Our own profile file: JSON, versioned, strict. Every name carries its unit; unknown names are refused."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from disaggserve.api.model import ApiModel

Coefficient = Annotated[float, Field(ge=0, le=1e6)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


class Residuals(ApiModel):
    """How far the fit is from the rows that it was made from: |predicted − measured| / measured."""

    median: float = Field(ge=0)
    p90: float = Field(ge=0)
    max: float = Field(ge=0)


class Span(ApiModel):
    """The least and the most that was measured."""

    least: Count
    most: Count


class Evidence(ApiModel):
    """The rows that one phase of one tp was fitted to."""

    form: Literal["perTp", "paper"]
    rows: Positive
    tokens: Span
    batch: Span
    context_tokens: Span
    residuals: Residuals


class Prefill(ApiModel):
    """A whole prefill: base + perToken·max(Σlen, flatTo) + perSquaredToken·Σlen² + perHop·(pp − 1)."""

    base_seconds: Coefficient
    seconds_per_token: Coefficient
    seconds_per_squared_token: Coefficient
    seconds_per_hop: Coefficient
    flat_to_tokens: Positive | None = None
    evidence: Evidence


class Regime(ApiModel):
    """A whole decode step: base + perContextToken·Σ(context + 1) + perRequest·batch + perHop·(pp − 1)."""

    base_seconds: Coefficient
    seconds_per_context_token: Coefficient
    seconds_per_request: Coefficient
    seconds_per_hop: Coefficient


class Decode(ApiModel):
    """One regime, or one below and one from `largeFromBatch` on."""

    small: Regime
    large: Regime | None = None
    large_from_batch: Positive | None = None
    evidence: Evidence


class ShapeFit(ApiModel):
    """One tp, and the pp that were measured with it."""

    tp: Positive
    pp: tuple[Positive, ...] = Field(min_length=1)
    prefill: Prefill
    decode: Decode


class Paper(ApiModel):
    """The paper's constants over all tp (REFERENCE § 1), with its attention blocks of 16 tokens; b divides C2 only.

    Prefill: c1·t·matrices/tp + c2·3·hidden·t₂/(16·tp) + c3. Decode: c4·matrices/tp + c5·3·hidden·t/tp. `matrices`
    are one layer's active weights, 4h² + 2hm in the paper's models.
    """

    c1_seconds: Coefficient
    c2_seconds: Coefficient
    c3_seconds: Coefficient
    c4_seconds: Coefficient
    c5_seconds: Coefficient
    prefill: Residuals
    decode: Residuals


class Document(ApiModel):
    """The whole file."""

    kind: Literal["disaggserve-profile"] = "disaggserve-profile"
    version: Literal[1] = 1
    model: str | None = Field(default=None, description="None: taken for any model that it is used with.")
    gpu: str | None = Field(default=None, description="nvidia.com/gpu.product; None: taken for any GPU.")
    engine: str | None = None
    provenance: str
    rows: Positive
    fits: tuple[ShapeFit, ...] = Field(min_length=1)
    paper: Paper | None = None


def read(value: object) -> Document:
    """The document of a parsed file. Raises `ValueError` with the first fault: field and problem."""
    try:
        found = Document.model_validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "document"
        raise ValueError(f"{field}: {first['msg'].lower()}") from None
    if len({f.tp for f in found.fits}) < len(found.fits):
        raise ValueError("fits: the same tp stands twice")
    for i, fit in enumerate(found.fits):
        for phase, evidence in (("prefill", fit.prefill.evidence), ("decode", fit.decode.evidence)):
            for span in (evidence.tokens, evidence.batch, evidence.context_tokens):
                if span.least > span.most:
                    raise ValueError(
                        f"fits.{i}.{phase}.evidence: least {span.least} is more than most {span.most}"
                    )
        if (fit.decode.large is None) != (fit.decode.large_from_batch is None):
            raise ValueError(f"fits.{i}.decode: large and largeFromBatch go together")
    return found
