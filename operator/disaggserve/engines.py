"""What each engine can do, said once: shapes, hand-off, flags that the operator owns.

Every refusal is one clause or sentence for people, or None.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal

from disaggserve import catalogue
from disaggserve.api.errors import InvalidInput

Role = Literal["prefill", "decode", "mixed"]
RoleChange = Literal["door", "label"]


class UnknownEngine(InvalidInput, ValueError):
    """The engine is none of torch, vllm, sglang, distserve."""


@dataclasses.dataclass(frozen=True)
class Engine:
    """An engine's habits that the plan and the simulator depend on (REFERENCE § 4, § 7)."""

    name: Literal["torch", "vllm", "sglang", "distserve"]
    handoff: Literal["pull", "push"]  # decode fetches after prefill | decode reserves, then prefill pushes
    first_token_from: Literal["prefill", "decode"]  # which side's token the user sees first
    prefill_limit: int | None  # prompt tokens in one batch; None: L_m (latency.saturation_tokens)
    architectures: frozenset[str]  # of catalogue.Model.architecture
    flags: frozenset[str]  # the operator's own; `engine.args` may not name them
    image: str = ""  # of its workers where the resource names none; empty: the release's own worker
    block_tokens: int = 16  # tokens per KV block
    prefix_cache: bool = False  # whether a prompt's KV is kept for others that begin alike
    quantised: frozenset[str] = frozenset()  # of catalogue.Model.quantised
    prefill_requests: int = 0  # prompts in one batch; 0: no limit
    # As soon as it may | with a step of decode | between two of them: its loop stands still
    transfer: Literal["link", "step", "inline"] = "link"
    transfer_bytes_s: float | None = (
        None  # what it moves KV with at most, whatever the link; None: the link's
    )
    # By what its KV goes from one real GPU to another where that is slower than the link between them; None: it takes the link.
    # Workers on simulated nodes keep the link's own time.
    carrier: catalogue.Link | None = None
    swap_bytes_s: float | None = None  # the preempted are swapped at this rate; None: recomputed
    colocates: bool = (
        False  # one instance does prefill and decode, prompts whole or in chunks beside decode steps
    )
    # How an instance takes another role without a new pod: asked at its own door (POST /role), or by its label alone, where
    # its role is nothing but the router's decision. None: not at all.
    role_change: RoleChange | None = None


def _flags(text: str) -> frozenset[str]:
    return frozenset(text.split())


TORCH = Engine(
    "torch",
    handoff="pull",
    first_token_from="prefill",
    prefill_limit=None,
    architectures=frozenset({"opt", "llama", "qwen3"}),
    carrier=catalogue.ZMQ,
    role_change="door",
    flags=_flags(
        "--model --weights --served-name --context-length --dtype --tp --pp --pairing-key --host --port "
        "--kv-port --chunk --pace"
    ),
)
# vLLM's max_num_batched_tokens on data-centre GPUs. NixlConnector: P's one token is dropped, D's is the
# user's first; D's scheduler starts a pull with a step, and hears of its end after one. Beside what the operator sets itself, flags that would hide the API (keys, TLS, sockets), the counters that
# the drain reads, or that put more than one engine behind one address and so behind one side channel.
VLLM = Engine(
    "vllm",
    image="vllm/vllm-openai:v0.32.0",  # what e2e/vllm holds the hand-off against
    handoff="pull",
    first_token_from="decode",
    prefill_limit=8192,
    prefix_cache=True,
    architectures=frozenset({"opt", "llama", "qwen3", "mixtral", "qwen3_moe"}),
    quantised=frozenset({"fp8", "int8"}),
    transfer="step",
    colocates=True,
    role_change="label",
    flags=_flags(
        "--model --served-model-name --revision --tensor-parallel-size -tp --pipeline-parallel-size -pp "
        "--host --port --max-model-len --dtype --kv-cache-dtype --block-size --kv-transfer-config "
        "--shutdown-timeout --config --model-tag --api-key --ssl-keyfile --ssl-certfile --root-path --uds --headless "
        "--disable-log-stats --data-parallel-size -dp --api-server-count -asc --nnodes"
    ),
)
# SGLang's chunked_prefill_size on data-centre GPUs. Decode reserves its blocks before prefill begins.
SGLANG = Engine(
    "sglang",
    handoff="push",
    first_token_from="decode",
    prefill_limit=8192,
    prefix_cache=True,
    architectures=frozenset({"opt", "llama", "qwen3", "mixtral", "qwen3_moe"}),
    quantised=frozenset({"fp8", "int8"}),
    colocates=True,
    flags=_flags(
        "--model-path --model --served-model-name --revision --tp-size --tp --tensor-parallel-size "
        "--pp-size --pipeline-parallel-size --host --port --context-length --dtype --kv-cache-dtype "
        "--page-size --disaggregation-mode --disaggregation-transfer-backend "
        "--disaggregation-bootstrap-port --config"
    ),
)
# The paper's own, which made the runs that the simulator is held against (REFERENCE § 4, and its public code); for
# simulating only. Its two rates were found by replaying those runs.
DISTSERVE = Engine(
    "distserve",
    handoff="pull",
    first_token_from="prefill",
    prefill_limit=8192,
    architectures=frozenset({"opt", "llama"}),
    flags=frozenset(),
    prefill_requests=128,
    transfer="inline",
    transfer_bytes_s=25e9,
    swap_bytes_s=20e9,
)
ENGINES = {e.name: e for e in (TORCH, VLLM, SGLANG)}  # that a resource may name


def engine(name: str) -> Engine:
    """The engine of that name. Raises `UnknownEngine`."""
    known = {**ENGINES, DISTSERVE.name: DISTSERVE}
    if name not in known:
        raise UnknownEngine(f"engine {name!r} is not known; known are {', '.join(known)}")
    return known[name]


def refuse_shape(
    engine: Engine, role: Role, tp: int, pp: int, other: tuple[int, int] | None = None
) -> str | None:
    """Why the engine cannot run this role in this shape, or None.

    `other` is (tp, pp) of the other side's instances, where it is known; without it only what this side alone
    rules out is refused. tp may differ between the sides on every engine (REFERENCE § 7).
    """
    if engine is VLLM and pp > 1:
        return f"vllm hands KV over only with pp 1 (NixlConnector), and this {role} has pp {pp}"
    if engine is SGLANG and other is not None:
        prefill_pp, decode_pp = (pp, other[1]) if role == "prefill" else (other[1], pp)
        if decode_pp not in (1, prefill_pp):
            return (
                f"sglang needs the decode's pp to be 1 or the prefill's {prefill_pp}, and it is {decode_pp}"
            )
    return None


def refuse_mixed(engine: Engine, kinds: int) -> str | None:
    """Why the engine cannot run instances that prefill and decode, of one kind (colocated) or of several between which
    requests move, or None."""
    if not engine.colocates:
        return f"{engine.name} does not prefill and decode in one instance"
    if kinds > 1:
        return f"{engine.name} does not move a request from one mixed instance to another"
    return None


def refuse_chunk(engine: Engine, chunk: int | None) -> str | None:
    """Why the engine cannot take prompts so in instances that prefill and decode (None: whole, before any decode step), or
    None. It can be simulated all the same: older versions did."""
    if engine is VLLM and chunk is None:
        return "vllm cuts prompts to what is left of its step, and never takes them whole before it decodes"
    return None


def refuse_start(engine: Engine, paired: bool) -> str | None:
    """Why this release does not start such an instance, in one sentence, or None.

    `paired`: prefill and decode in one container (a low-affinity plan). Plans are made and explained all the
    same; the operator says this in a condition before any pod exists.
    """
    if engine not in (TORCH, VLLM):
        return (
            f"This release plans for {engine.name} but starts only torch and vllm workers, which it is tested against; "
            "set engine.type to one of them."
        )
    if paired and engine is not TORCH:
        return (
            f"This release starts low-affinity pairs (prefill and decode in one container) of torch only, not of {engine.name}; "
            "set engine.type to torch, or choose planner.algorithm HighAffinity."
        )
    return None


def refuse_architecture(engine: Engine, architecture: str, quantised: str = "") -> str | None:
    """Why the engine cannot run a model of this architecture and kind of weights, in one sentence, or None."""
    if architecture not in engine.architectures:
        known = ", ".join(sorted(engine.architectures))
        return f"The {engine.name} worker runs {known} models, not {architecture}."
    if quantised and quantised not in engine.quantised:
        return f"The {engine.name} worker runs bf16, fp16 and fp32 weights, not {quantised}."
    return None


def owned_flags(engine: Engine) -> frozenset[str]:
    """Command-line flags that the operator sets itself."""
    return engine.flags


def refuse_args(engine: Engine, args: Iterable[str]) -> str | None:
    """Why `engine.args` cannot be passed on, in one sentence naming the first flag that the operator owns, or
    None.

    `--flag=value`, vLLM's `--flag.key value`, spellings with `_` for `-` and abbreviations (argparse takes them) count as
    the flag.
    """
    for arg in args:
        flag = arg.split("=", 1)[0]
        if flag.startswith("--"):
            flag = "--" + flag[2:].split(".", 1)[0].replace("_", "-")
        short = len(flag) > 2 and flag.startswith("--")
        owned = flag if flag in engine.flags else None
        if owned is None and short:
            owned = next((f for f in sorted(engine.flags) if f.startswith(flag)), None)
        if owned:
            return f"engine.args names {owned}, which the operator sets itself; leave it out."
    return None
