"""`disaggserve simulate`: the requests of a trace on a plan."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from disaggserve import plan, simulate, workload
from disaggserve.api.errors import InvalidInput
from disaggserve.api.plan import Plan
from disaggserve.cli import show
from disaggserve.cli.files import text


def read_plan(path: Path) -> Plan:
    """A plan as `disaggserve plan -o json` prints it, or as `status.plan` holds it."""
    try:
        return Plan.model_validate_json(text(path), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "document"
        raise InvalidInput(
            f"{path}: {field}: {first['msg'].lower()}; give what `disaggserve plan -o json` or status.plan prints"
        ) from None


def run(file: Path, trace: Path, output: str, rows: Path | None) -> None:
    planned = read_plan(file)
    if planned.setting is None:
        raise InvalidInput(f"{file}: setting is missing: this plan does not say model, GPU and promise")
    requests = workload.read_trace(trace)
    with show.busy("simulating"):
        deployment, promise = plan.replay(planned)
        outcome = simulate.run(deployment, requests)
        prediction = simulate.judge(requests, outcome, promise)
    if rows is not None:
        _write(rows, requests, outcome)
    show.prediction(prediction, promise, planned, output)


def _write(path: Path, requests: workload.Requests, outcome: simulate.Outcome) -> None:
    """One row per request; times in seconds, empty where the request never got there."""
    ttft = (outcome.first_ns - requests.arrival_ns) / 1e9
    steps = np.maximum(requests.output - 1, 1)
    tpot = np.where(requests.output > 1, (outcome.last_ns - outcome.first_ns) / 1e9 / steps, 0.0)
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["arrival_s", "input_tokens", "output_tokens", "ttft_s", "tpot_s"])
        for k in range(len(requests)):
            done = outcome.last_ns[k] >= 0
            out.writerow(
                [
                    f"{requests.arrival_ns[k] / 1e9:.6f}",
                    int(requests.input[k]),
                    int(requests.output[k]),
                    f"{ttft[k]:.6f}" if done else "",
                    f"{tpot[k]:.6f}" if done else "",
                ]
            )
