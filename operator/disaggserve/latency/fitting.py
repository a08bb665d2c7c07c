"""From measured steps to a profile, by non-negative least squares of relative errors.

Two forms of a whole pass, REFERENCE § 1; the one that predicts rows it has not seen better is taken, per phase:

    perTp    prefill a + b·Σlen + c·Σlen² (+ d·(pp − 1))          decode A + B·Σ(context + 1) + C·batch (+ D·(pp − 1))
    paper    prefill C1·t·matrices/tp + C2·3h·t₂/(16·tp) + C3     decode C4·matrices/tp + C5·3h·t/tp

perTp has constants of its own for every tp, paper one set for all; with several pp a hop is fitted too. A perTp decode
may have two regimes, as DistServe's have, and a perTp prefill may be flat up to some Σlen, while reading the weights
takes longer than multiplying with them. `matrices` are a layer's weights that a token is multiplied with, 4h² + 2hm
in the paper's models; the paper divides h and m by tp, and a matrix shared out over tp GPUs is a tp-th of it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from disaggserve import __version__
from disaggserve.catalogue import GPU, Model
from disaggserve.latency import physics, records
from disaggserve.latency.errors import BadMeasurements
from disaggserve.latency.measurements import Phase, Row
from disaggserve.latency.steps import Floats

MIN_ROWS = 4  # of one phase and tp: one more than there are constants
FOLDS = 5
_BETTER = 0.9  # a second regime or a flat start must predict unseen rows with at most this share of the error without
_TOLD_APART = 1e-3  # least singular value, of the greatest, of columns that count as different
_ATTENTION_BLOCK = 16

Coefficients = tuple[float, float, float, float]  # base, per token (of context), squares or batch, per hop


@dataclasses.dataclass(frozen=True)
class Curve:
    """One phase at one tp, seconds of a whole pass."""

    small: Coefficients
    large: Coefficients | None = None
    large_from: int = 0  # batch
    flat_to: int = 0  # Σlen of a prefill

    def seconds(self, rows: Sequence[Row]) -> Floats:
        x = _features(rows, self.flat_to)
        found: Floats = x @ np.array(self.small)
        if self.large is not None:
            batch = np.array([r.batch for r in rows])
            found = np.where(batch < self.large_from, found, x @ np.array(self.large))
        return found


Curves = Mapping[int, Curve]  # by tp


def fit(
    rows: Sequence[Row], provenance: str, model: Model | None, gpu: GPU | None, engine: str | None
) -> records.Document:
    """The profile of sorted rows. Raises `BadMeasurements` with what cannot be told apart, and where."""
    by_tp = {tp: list(group) for tp, group in itertools.groupby(rows, lambda r: r.tp)}
    for tp, group in by_tp.items():
        _identify(tp, group)
    prefill = [r for r in rows if r.phase == "prefill"]
    decode = [r for r in rows if r.phase == "decode"]
    chosen = {
        "prefill": _choose(prefill, model, gpu),
        "decode": _choose(decode, model, gpu),
    }
    fits = []
    for tp in by_tp:
        mine = {"prefill": [r for r in prefill if r.tp == tp], "decode": [r for r in decode if r.tp == tp]}
        p, d = chosen["prefill"][1][tp], chosen["decode"][1][tp]
        evidence = {k: _evidence(chosen[k][0], mine[k], chosen[k][1][tp]) for k in mine}
        fits.append(
            records.ShapeFit(
                tp=tp,
                pp=tuple(sorted({r.pp for r in by_tp[tp]})),
                prefill=records.Prefill(
                    base_seconds=p.small[0],
                    seconds_per_token=p.small[1],
                    seconds_per_squared_token=p.small[2],
                    seconds_per_hop=p.small[3],
                    flat_to_tokens=p.flat_to or None,
                    evidence=evidence["prefill"],
                ),
                decode=records.Decode(
                    small=_regime(d.small),
                    large=_regime(d.large) if d.large is not None else None,
                    large_from_batch=d.large_from or None,
                    evidence=evidence["decode"],
                ),
            )
        )
    if any(r.batch > 1 for r in prefill):
        provenance += "; the prompts of a prefill batch were taken as equally long (Σlen² = tokens²/batch)"
    return records.Document(
        model=model.id if model else None,
        gpu=gpu.product if gpu else None,
        engine=engine,
        provenance=f"{provenance}; disaggserve {__version__}",
        rows=len(rows),
        fits=tuple(fits),
        paper=_constants(prefill, decode, model) if model else None,
    )


# ---- what can be told apart


def _identify(tp: int, rows: Sequence[Row]) -> None:
    pps: dict[str, set[int]] = {}
    for phase in ("prefill", "decode"):
        mine = [r for r in rows if r.phase == phase]
        what = f"{phase} with tp {tp}"
        if not mine:
            raise BadMeasurements(
                f"column phase: tp {tp} has no {phase} row (line {rows[0].line} is of the other phase); "
                "measure both"
            )
        pps[phase] = {r.pp for r in mine}
        lines = ", ".join(str(n) for n in sorted(r.line for r in mine))
        if len(mine) < MIN_ROWS:
            raise BadMeasurements(
                f"{what} has {len(mine)} row{'s' if len(mine) > 1 else ''} (line {lines}); at least {MIN_ROWS} are "
                "needed for its three constants"
            )
        least = {"tokens": 3} if phase == "prefill" else {"batch": 2, "context_tokens": 2}
        for column, needed in least.items():
            values = sorted({getattr(r, column) for r in mine})
            if len(values) < needed:
                said = " and ".join(map(str, values))
                raise BadMeasurements(
                    f"{what}: column {column} is {said} in every row (line {mine[0].line} is one); at least {needed} "
                    "values are needed"
                )
        x = _features(mine)
        x = x[:, : 4 if len(pps[phase]) > 1 else 3] / np.array([r.seconds for r in mine])[:, None]
        spread = np.linalg.svd(x / np.linalg.norm(x, axis=0), compute_uv=False)
        if spread[-1] < _TOLD_APART * spread[0]:
            raise BadMeasurements(
                f"{what}: columns "
                + (
                    "tokens, batch and pp do not vary apart; measure more lengths of single prompts"
                    if phase == "prefill"
                    else "batch, context_tokens and pp do not vary apart; measure one batch at two contexts"
                )
                + f" (line {mine[0].line} is the first)"
            )
    if pps["prefill"] != pps["decode"]:
        alone = sorted(pps["prefill"] ^ pps["decode"])[0]
        line = next(r.line for r in rows if r.pp == alone)
        raise BadMeasurements(
            f"column pp: tp {tp} with pp {alone} has one phase only (line {line}); measure both"
        )


# ---- the forms


def _features(rows: Sequence[Row], flat_to: int = 0) -> Floats:
    """[n, 4]: what the coefficients are multiplied with."""
    return np.array(
        [
            [1.0, max(r.tokens, flat_to), r.squares, r.pp - 1]
            if r.phase == "prefill"
            else [1.0, r.context_tokens + r.batch, r.batch, r.pp - 1]
            for r in rows
        ]
    )


def _choose(rows: Sequence[Row], model: Model | None, gpu: GPU | None) -> tuple[str, Curves]:
    """The form and its curves, rounded to six digits: in more, machines may differ, and none is measured."""

    def single(some: Sequence[Row]) -> Curves:
        return {tp: Curve(_solved(g, model, gpu)) for tp, g in _grouped(some)}

    form, curves = "perTp", {tp: _regimes(g, model, gpu) for tp, g in _grouped(rows)}
    if model is not None:
        paper = _held_out(rows, lambda some: _paper(some, model))
        if paper <= _held_out(rows, single) and all(
            c.large is None and not c.flat_to for c in curves.values()
        ):
            form, curves = "paper", dict(_paper(rows, model))
    return form, curves


def _grouped(rows: Sequence[Row]) -> list[tuple[int, list[Row]]]:
    return [(tp, list(g)) for tp, g in itertools.groupby(rows, lambda r: r.tp)]


def _regimes(rows: Sequence[Row], model: Model | None, gpu: GPU | None) -> Curve:
    """One line, or one with a bend where that predicts unseen rows clearly better.

    Decode: two lines, from a batch on another. Prefill: flat up to some Σlen.
    """

    def straight(some: Sequence[Row]) -> Curve:
        return Curve(_solved(some, model, gpu))

    def split(some: Sequence[Row], at: int) -> Curve:
        sides = [r for r in some if r.batch < at], [r for r in some if r.batch >= at]
        if not all(sides):  # of a fold
            return straight(some)
        return Curve(_solved(sides[0], model, gpu), _solved(sides[1], model, gpu), at)

    def flat(some: Sequence[Row], at: int) -> Curve:
        return Curve(_solved(some, model, gpu, at), flat_to=at)

    def place(row: Row) -> int:
        return row.batch if row.phase == "decode" else row.tokens

    def enough(at: int) -> bool:
        below, above = [place(r) for r in rows if place(r) < at], [place(r) for r in rows if place(r) >= at]
        lines = [above, below] if rows[0].phase == "decode" else [above]
        return bool(below) and all(len(side) > MIN_ROWS and len(set(side)) > 1 for side in lines)

    bend = split if rows[0].phase == "decode" else flat
    bends = [at for at in sorted({place(r) for r in rows}) if enough(at)]
    if not bends:
        return straight(rows)
    at = min(bends, key=lambda at: float(np.mean(_off(bend(rows, at), rows) ** 2)))
    without = _held_out(rows, lambda some: {rows[0].tp: straight(some)})
    with_it = _held_out(rows, lambda some: {rows[0].tp: bend(some, at)})
    return bend(rows, at) if with_it < _BETTER * without else straight(rows)


def _solved(rows: Sequence[Row], model: Model | None, gpu: GPU | None, flat_to: int = 0) -> Coefficients:
    """Coefficients of one tp, none below what the hardware allows where it is known."""
    least = np.zeros(4)
    if model is not None and gpu is not None:
        least[1:3] = physics.least_slopes_s(model, gpu, rows[0].tp, rows[0].phase)
    return _least_squares(_features(rows, flat_to), np.array([r.seconds for r in rows]), least)


def _paper(rows: Sequence[Row], model: Model) -> Curves:
    constants = _paper_constants(rows, model)
    return {
        tp: Curve(_rounded(constants * _paper_units(rows[0].phase, tp, model))) for tp, _ in _grouped(rows)
    }


def _paper_units(phase: Phase, tp: int, model: Model) -> Floats:
    """What C (base, per token, squares or batch, hop) is multiplied with to be perTp's coefficient."""
    matrices, attention = model.active_layer_params / tp, 3 * model.hidden / tp
    if phase == "prefill":
        return np.array([1.0, matrices, attention / _ATTENTION_BLOCK, 1.0])
    return np.array([matrices, attention, 0.0, 1.0])


def _paper_constants(rows: Sequence[Row], model: Model) -> Floats:
    """C3, C1, C2 (prefill) or C4, C5 and a zero (decode), and the hop, over all tp."""
    units = np.array([_paper_units(r.phase, r.tp, model) for r in rows])
    seconds = np.array([r.seconds for r in rows])
    return np.array(_least_squares(_features(rows) * units, seconds, np.zeros(4)))


def _least_squares(x: Floats, seconds: Floats, least: Floats) -> Coefficients:
    """argmin Σ((x·c − seconds)/seconds)² over c ≥ least: the best of the unbounded optima over all choices of columns.

    Columns of zeros get their least. Exact, for there are at most four columns; fewer win where they do as well.
    """
    scaled = x / seconds[:, None]
    norms = np.linalg.norm(scaled, axis=0)
    columns = [i for i in range(x.shape[1]) if norms[i] > 0]
    target = 1.0 - scaled @ least
    best, found = float(np.mean(target**2)), np.zeros(x.shape[1])
    for size in range(1, len(columns) + 1):
        for chosen in itertools.combinations(columns, size):
            part = scaled[:, chosen] / norms[list(chosen)]
            solution = np.linalg.lstsq(part, target, rcond=None)[0]
            error = float(np.mean((part @ solution - target) ** 2))
            if np.all(solution >= 0) and error < best * (1 - 1e-9):
                best, found = error, np.zeros(x.shape[1])
                found[list(chosen)] = solution / norms[list(chosen)]
    return _rounded(found + least)


def _rounded(values: Floats) -> Coefficients:
    a, b, c, d = (float(f"{v:.6g}") for v in values)
    return a, b, c, d


# ---- how good it is


def _off(curve: Curve, rows: Sequence[Row]) -> Floats:
    """|predicted − measured| / measured."""
    seconds = np.array([r.seconds for r in rows])
    off: Floats = np.abs(curve.seconds(rows) / seconds - 1)
    return off


def _held_out(rows: Sequence[Row], form: Callable[[Sequence[Row]], Curves]) -> float:
    """Mean relative error of rows that the form was not fitted to, over five folds of every tp."""
    fold = {r: i % FOLDS for _, group in _grouped(rows) for i, r in enumerate(group)}
    errors: list[float] = []
    for k in range(FOLDS):
        curves = form([r for r in rows if fold[r] != k])
        errors += [float(_off(curves[r.tp], [r])[0]) for r in rows if fold[r] == k]
    return float(np.mean(errors))


def _residuals(off: Floats) -> records.Residuals:
    median, p90 = np.quantile(off, [0.5, 0.9])
    return records.Residuals(
        median=round(float(median), 4), p90=round(float(p90), 4), max=round(float(off.max()), 4)
    )


def _evidence(form: str, rows: Sequence[Row], curve: Curve) -> records.Evidence:
    def span(column: str) -> records.Span:
        values = [getattr(r, column) for r in rows]
        return records.Span(least=min(values), most=max(values))

    return records.Evidence(
        form="paper" if form == "paper" else "perTp",
        rows=len(rows),
        tokens=span("tokens"),
        batch=span("batch"),
        context_tokens=span("context_tokens"),
        residuals=_residuals(_off(curve, rows)),
    )


def _regime(c: Coefficients) -> records.Regime:
    return records.Regime(
        base_seconds=c[0], seconds_per_context_token=c[1], seconds_per_request=c[2], seconds_per_hop=c[3]
    )


def _constants(prefill: Sequence[Row], decode: Sequence[Row], model: Model) -> records.Paper:
    c3, c1, c2, _ = _paper_constants(prefill, model)
    c4, c5, _, _ = _paper_constants(decode, model)

    def off(rows: Sequence[Row]) -> records.Residuals:
        curves = _paper(rows, model)
        return _residuals(np.concatenate([_off(curves[tp], group) for tp, group in _grouped(rows)]))

    return records.Paper(
        c1_seconds=c1,
        c2_seconds=c2,
        c3_seconds=c3,
        c4_seconds=c4,
        c5_seconds=c5,
        prefill=off(prefill),
        decode=off(decode),
    )
