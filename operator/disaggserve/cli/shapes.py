"""`--shape`: groups of equal instances, written `prefill=1xtp2pp1,decode=2xtp1pp1`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal

from disaggserve import engines, search
from disaggserve.api.errors import InvalidInput
from disaggserve.catalogue import GPU, Model
from disaggserve.engines import Engine
from disaggserve.latency import Profile
from disaggserve.search.packing import Wanted
from disaggserve.simulate import Deployment, Pool

FORM = (
    "write groups like prefill=1xtp2pp1,decode=2xtp1pp1, mixed=2xtp1pp1:chunk512, or "
    "colocated=4xtp1pp1:vllm (or :mii, :chunk512)"
)
_GROUP = re.compile(
    r"(prefill|decode|mixed|colocated)=(\d{1,4})x(?:tp(\d{1,3}))(?:pp(\d{1,3}))?(?::(vllm|mii|chunk(\d{1,6})))?"
)
# DeepSpeed-MII's split-fuse puts so many tokens into a step (DeepSpeed's default max_ragged_batch_size).
_MII_TOKENS = 768


@dataclasses.dataclass(frozen=True)
class Shape:
    """Instances of one role and split. `chunk`: tokens of a step that prompts are cut to; None: whole prompts."""

    role: Literal["prefill", "decode", "mixed", "colocated"]
    count: int
    tp: int
    pp: int
    chunk: int | None = None

    @property
    def gpus(self) -> int:
        return self.count * self.tp * self.pp

    def values(self) -> list[str | int | None]:
        """For digests."""
        return [self.role, self.tp, self.pp, self.count, self.chunk]


def parse(text: str) -> tuple[Shape, ...]:
    """The groups of `--shape`. Raises `InvalidInput`."""
    shapes = tuple(_group(part.strip()) for part in text.split(","))
    roles = {s.role for s in shapes}
    if "colocated" in roles and len(roles) > 1:
        raise InvalidInput(
            f"shape {text}: colocated instances keep their requests to themselves; compare them with the others instead"
        )
    if not roles & {"mixed", "colocated"} and roles != {"prefill", "decode"}:
        raise InvalidInput(f"shape {text}: has only {', '.join(roles)} instances; {FORM}")
    return shapes


def _group(text: str) -> Shape:
    match = _GROUP.fullmatch(text)
    if match is None:
        raise InvalidInput(f"shape {text!r} is not understood; {FORM}")
    role, count, tp, pp, how, tokens = match.groups()
    chunk = _MII_TOKENS if how == "mii" else int(tokens) if tokens else None
    if min(int(count), int(tp), int(pp or 1), 1 if chunk is None else chunk) < 1:
        raise InvalidInput(f"shape {text!r}: counts, tp, pp and chunks are at least 1")
    if role in ("prefill", "decode") and how:
        raise InvalidInput(f"shape {text!r}: only mixed and colocated instances take :{how}; leave it out")
    if role == "mixed" and chunk is None:
        raise InvalidInput(f"shape {text!r}: mixed instances cut prompts; add :chunk512 or another size")
    if role == "colocated" and not how:
        raise InvalidInput(f"shape {text!r}: say how it schedules: add :vllm, :mii or :chunk512")
    return Shape(role, int(count), int(tp), int(pp or 1), chunk)  # type: ignore[arg-type]


def deployment(
    model: Model, engine: Engine, gpu: GPU, shapes: Sequence[Shape], link: str, profile: Profile | None
) -> Deployment:
    """The simulator's view of these instances. Raises what the parts of the model do, and `InvalidInput`."""
    wanted: list[Wanted] = []
    for s in shapes:
        if s.role in ("prefill", "decode"):
            other = next(
                ((o.tp, o.pp) for o in shapes if o.role in ("prefill", "decode") and o.role != s.role), None
            )
            if reason := engines.refuse_shape(engine, s.role, s.tp, s.pp, other):
                raise InvalidInput(f"shape {s.role}={s.count}xtp{s.tp}pp{s.pp}: {reason}")
            wanted.append((s.role, s.tp, s.pp, s.count))
    pools = search.deployment(model, engine, gpu, wanted, link, profile=profile)
    mixed = tuple(
        _mixed(search.pool(model, gpu, engine, s.tp, s.pp, s.count, profile), s)
        for s in shapes
        if s.role in ("mixed", "colocated")
    )
    if not mixed:
        return pools
    together = dataclasses.replace(pools, mixed=mixed, sticky=shapes[0].role == "colocated")
    if wanted:
        return together
    # No instance only prefills or only decodes: how the engine hands KV from one to the other does not matter.
    return dataclasses.replace(together, first_token_from="prefill", handoff="pull", transfer="link")


def refuse(engine: Engine, shapes: Sequence[Shape]) -> str | None:
    """Why no plan for the engine has these instances that prefill and decode, or None. It is simulated all the same."""
    if all(s.role in ("prefill", "decode") for s in shapes):
        return None
    # Colocated instances keep their requests; mixed ones, where there are several, hand them to one another.
    kinds = 1 if shapes[0].role == "colocated" else sum(s.count for s in shapes)
    return engines.refuse_mixed(engine, kinds)


def _mixed(pool: Pool, shape: Shape) -> Pool:
    """vLLM batches whole prompts, before any decode step; a chunked step takes prompts in pieces beside decode."""
    if shape.chunk is not None:
        return dataclasses.replace(pool, batch_tokens=shape.chunk, policy="chunked")
    assert engines.VLLM.prefill_limit is not None
    return dataclasses.replace(pool, batch_tokens=engines.VLLM.prefill_limit)
