"""What each engine can do, as exact tables."""

import pytest

from disaggserve import engines
from disaggserve.engines import DISTSERVE, SGLANG, TORCH, VLLM, UnknownEngine


@pytest.mark.parametrize(
    ("engine", "role", "shape", "other", "refused"),
    [
        (TORCH, "prefill", (4, 1), (2, 2), False),
        (TORCH, "decode", (4, 3), (3, 3), False),
        (VLLM, "prefill", (8, 1), (2, 1), False),
        (VLLM, "prefill", (1, 2), (1, 1), True),
        (VLLM, "decode", (2, 2), None, True),
        (SGLANG, "decode", (2, 2), (4, 2), False),
        (SGLANG, "decode", (2, 1), (4, 2), False),
        (SGLANG, "decode", (2, 2), (4, 1), True),
        (SGLANG, "prefill", (4, 1), (2, 2), True),
        (SGLANG, "prefill", (4, 2), (2, 1), False),
        (SGLANG, "prefill", (4, 2), None, False),
    ],
)
def test_shapes(engine, role, shape, other, refused):
    reason = engines.refuse_shape(engine, role, *shape, other)
    assert (reason is not None) == refused
    if reason:
        assert engine.name in reason
        assert "pp" in reason


@pytest.mark.parametrize(
    ("engine", "paired", "words"),
    [
        (TORCH, False, None),
        (TORCH, True, None),
        (VLLM, False, None),
        (VLLM, True, "low-affinity pairs (prefill and decode in one container) of torch only, not of vllm"),
        (SGLANG, False, "starts only torch and vllm"),
    ],
)
def test_what_this_release_starts(engine, paired, words):
    reason = engines.refuse_start(engine, paired)
    assert reason is None if words is None else words in (reason or "")


def test_habits():
    assert [
        (e.handoff, e.first_token_from, e.prefill_limit, e.block_tokens) for e in (TORCH, VLLM, SGLANG)
    ] == [
        ("pull", "prefill", None, 16),
        ("pull", "decode", 8192, 16),
        ("push", "decode", 8192, 16),
    ]


def test_engines_by_name():
    names = ("torch", "vllm", "sglang", "distserve")
    assert [engines.engine(n) for n in names] == [TORCH, VLLM, SGLANG, DISTSERVE]
    with pytest.raises(UnknownEngine, match="torch, vllm, sglang, distserve"):
        engines.engine("tgi")


def test_architectures():
    assert [engines.refuse_architecture(TORCH, a) for a in ("opt", "llama", "qwen3")] == [None] * 3
    assert "not qwen3_moe" in (engines.refuse_architecture(TORCH, "qwen3_moe") or "")
    assert engines.refuse_architecture(VLLM, "qwen3") is None
    assert engines.refuse_architecture(VLLM, "qwen3_moe", "fp8") is None
    assert engines.refuse_architecture(TORCH, "llama", "") is None
    assert "not fp8" in (engines.refuse_architecture(TORCH, "llama", "fp8") or "")


@pytest.mark.parametrize(
    ("engine", "args", "flag"),
    [
        (TORCH, ["--max-batch", "8"], None),
        (TORCH, ["--tp", "2"], "--tp"),
        (TORCH, ["--pace={}"], "--pace"),
        (VLLM, ["--enforce-eager", "--tensor_parallel_size=2"], "--tensor-parallel-size"),
        (VLLM, ["-tp", "2"], "-tp"),
        (VLLM, ["--kv-transfer-config", "{}"], "--kv-transfer-config"),
        (VLLM, ["--kv-transfer-config.kv_role", "kv_producer"], "--kv-transfer-config"),
        (VLLM, ["--kv_tr={}"], "--kv-transfer-config"),
        (VLLM, ["--api-key", "k"], "--api-key"),
        (VLLM, ["--max-num-seqs", "16", "--kv-cache-memory-bytes=1"], None),
        (SGLANG, ["--disaggregation-mode=prefill"], "--disaggregation-mode"),
        (SGLANG, ["--mem-fraction-static", "0.8"], None),
    ],
)
def test_flags_that_the_operator_owns(engine, args, flag):
    reason = engines.refuse_args(engine, args)
    assert reason is None if flag is None else f"names {flag}," in (reason or "")
    assert flag is None or flag in engines.owned_flags(engine)
