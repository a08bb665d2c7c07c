"""The status of a `DisaggServe` resource. Written on decisions and changes of condition only; live figures are metrics."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from disaggserve.api.model import ApiModel
from disaggserve.api.plan import Name, Plan, Text

ConditionType = Literal["Ready", "PlanFeasible", "Progressing", "MeetingSLO", "MetricsFresh"]


class Condition(ApiModel):
    type: Name = Field(description="Ready, PlanFeasible, Progressing, MeetingSLO or MetricsFresh.")
    status: Literal["True", "False", "Unknown"] = Field(description="True, False or Unknown.")
    reason: Name = Field(description="One word for programs. Example: GPUsClaimed.")
    message: str = Field(max_length=4096, description="One sentence for people.")
    last_transition_time: Text = Field(description="When status last changed, RFC 3339.")
    observed_generation: int | None = Field(
        default=None, description="Generation of the spec that this is about."
    )


class Observed(ApiModel):
    """Traffic as the last decision saw it."""

    rate: float = Field(ge=0, description="Arrivals, req/s. Example: 5.1.")
    input_mean: float = Field(ge=0, description="Mean prompt length, tokens. Example: 252.")
    output_mean: float = Field(ge=0, description="Mean output length, tokens. Example: 186.")
    cv: float = Field(
        ge=0, description="Coefficient of variation of the gaps between arrivals. Example: 1.0."
    )
    attainment: float | None = Field(
        default=None, ge=0, le=1, description="Share of requests that met both promises. Example: 0.93."
    )
    requests: int = Field(ge=0, description="Requests in the window. Example: 3000.")
    window: Text = Field(description="The window looked at. Example: 10m.")
    emulated: bool = Field(default=False, description="True when served by simulated GPUs.")


class Proposal(ApiModel):
    """A plan that is not carried out."""

    prefill: Text = Field(description="Prefill in short. Example: 2×tp2.")
    decode: Text = Field(description="Decode in short. Example: 1×tp2.")
    mixed: Text = Field(default="", description="Mixed in short. Example: 3×tp1 with chunks of 512.")
    gpus: int = Field(ge=1, description="GPUs. Example: 6.")
    attainment: float = Field(ge=0, le=1, description="Predicted attainment. Example: 0.95.")
    reason: str = Field(max_length=4096, description="Why it would be better, and why it waits.")


class RolloutStatus(ApiModel):
    revision: int = Field(ge=1, description="Revision being carried out. Example: 2.")
    step: Text = Field(description="What is being done. Example: waiting for 2 new instances.")
    blocked_by: Text = Field(
        default="",
        description="What it waits for; empty when nothing blocks. Example: 3 requests in flight on chat-ab12cd-tp1pp1-0-0.",
    )


class Decision(ApiModel):
    time: Text = Field(description="When, RFC 3339.")
    action: Literal["Plan", "Replan", "Hold", "Advise", "RollBack"] = Field(description="What was decided.")
    reason: str = Field(max_length=4096, description="Why, in one sentence.")


class Status(ApiModel):
    observed_generation: int | None = Field(
        default=None, description="Generation of the spec that was last acted on."
    )
    phase: Text = Field(
        default="", description="In one word, for people; derived from conditions and read by no code."
    )
    conditions: tuple[Condition, ...] = Field(
        default=(), max_length=16, description="Ready, PlanFeasible, Progressing, MeetingSLO, MetricsFresh."
    )
    url: Text = Field(
        default="", description="Where clients send requests. Example: http://chat.default.svc:8000/v1."
    )
    plan: Plan | None = Field(default=None, description="The committed plan.")
    proposal: Proposal | None = Field(default=None, description="A better plan, with replan.mode Advise.")
    rollout: RolloutStatus | None = Field(default=None, description="The change under way, if any.")
    observed: Observed | None = Field(default=None, description="Traffic as the last decision saw it.")
    last_decision: Decision | None = Field(default=None, description="What was decided last, and why.")
