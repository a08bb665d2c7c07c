"""`disaggserve fit`: a profile of step times from measured steps."""

from __future__ import annotations

import hashlib
from pathlib import Path

from rich.console import Console
from rich.table import Table

from disaggserve import catalogue, engines, latency
from disaggserve.api.errors import InvalidInput
from disaggserve.cli.files import text
from disaggserve.latency import fitting, measurements, records

_out = Console(highlight=False)


def run(
    file: Path, output: Path, model_id: str | None, product: str | None, engine: str | None, note: str = ""
) -> None:
    model = catalogue.model(model_id) if model_id is not None else None
    gpu = catalogue.gpu(product) if product is not None else None
    if engine not in (None, "distserve"):
        engines.engine(str(engine))
    content = text(file)
    name = "standard input" if str(file) == "-" else file.name
    rows = measurements.read(content, name, model, gpu)
    digest = hashlib.sha256(content.encode()).hexdigest()[:12]
    said = f"{note}; " if note else ""
    document = fitting.fit(rows, f"{said}fitted to {name} (sha256 {digest})", model, gpu, engine)
    profile = latency.Profile.of(document.model_dump(mode="json", exclude_none=True), output)
    if model is not None and gpu is not None:
        for tp, pp in profile.measured(model):
            latency.step_times(model, gpu, tp, pp, profile)
    try:
        profile.dump(output)
    except OSError as error:
        raise InvalidInput(f"{output}: cannot be written: {error.strerror}") from None
    _show(document, output, profile.digest)


def _show(document: records.Document, output: Path, digest: str) -> None:
    """What was fitted and how far it is from its rows, relative to them."""
    table = Table("phase", "tp", "pp", "rows", "form", "median", "p90", "max", box=None, pad_edge=False)
    for fit in document.fits:
        flat, large = fit.prefill.flat_to_tokens, fit.decode.large_from_batch
        for phase, evidence, bend in (
            ("prefill", fit.prefill.evidence, f", flat to {flat} tokens" if flat else ""),
            ("decode", fit.decode.evidence, f", another from batch {large}" if large else ""),
        ):
            off = evidence.residuals
            table.add_row(
                phase,
                str(fit.tp),
                ",".join(map(str, fit.pp)),
                str(evidence.rows),
                evidence.form + bend,
                *(f"{share:.1%}" for share in (off.median, off.p90, off.max)),
            )
    _out.print(table)
    for what, said in (("model", document.model), ("GPU", document.gpu)):
        if said is None:
            _out.print(
                f"No --{what.lower()} was given: the profile will be taken for any {what} that a plan names."
            )
    _out.print(f"{output}: {document.provenance}; digest {digest[:12]}", soft_wrap=True)
