"""Models, GPUs and links: shapes, sizes and limits, each with its source.

Plain values and arithmetic; the worker and the operator both read it, so it imports nothing that costs time.

Errors, all of them `CatalogueError` (a `ValueError`) with one sentence each:

    CatalogueError
    ├── UnknownModel      the id is not in the catalogue (the known ones are named)
    ├── UnknownGPU        the product is not in the catalogue (the known ones are named)
    ├── BadModelConfig    a config.json lacks a field, or describes what is not supported
    └── BadShape          tp or pp does not divide the model
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from disaggserve.api.errors import InvalidInput

Architecture = Literal["opt", "llama", "qwen3", "mixtral", "qwen3_moe"]
Quantised = Literal["", "fp8", "int8"]

BLOCK_TOKENS = 16  # tokens per KV block, as in the paper's engine (§ 4) and vLLM on CUDA
MEMORY_UTILISATION = 0.95  # share of GPU memory that DistServe's engine uses (its default)
ACTIVATION_SHARE = 0.01  # share of GPU memory that DistServe's engine keeps for activations


class CatalogueError(InvalidInput, ValueError):
    """What the catalogue cannot answer, in one sentence."""


class UnknownModel(CatalogueError):
    """The model id is not in the catalogue."""


class UnknownGPU(CatalogueError):
    """The GPU product is not in the catalogue."""


class BadModelConfig(CatalogueError):
    """A Hugging Face config.json lacks a field or describes a model that is not supported."""


class BadShape(CatalogueError):
    """tp or pp does not divide the model."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder-only transformer, dense or with experts. Sizes are in elements unless a name says bytes.

    With experts each layer's feed-forward is `experts` feed-forwards of `ffn`, of which a token goes through
    `experts_per_token`, and a router. Quantised weights are one byte in the matrices of the layers; the
    vocabulary tables, norms, router and activations keep `bytes_per_activation`, and so does KV.
    """

    id: str
    architecture: Architecture
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_positions: int
    tied: bool  # the output head is the embedding table
    bytes_per_weight: int = 2  # of the layers' matrices
    bytes_per_activation: int = 2  # and of tables, norms and router
    bytes_per_kv: int = 2
    experts: int = 0  # 0: dense
    experts_per_token: int = 0
    quantised: Quantised = ""
    weight_block: int = (
        0  # elements of a side of the blocks that weights are quantised by; 0: whole rows or tensors
    )
    source: str = dataclasses.field(default="", compare=False)

    @property
    def gated(self) -> bool:
        """Whether the feed-forward has a gate (three matrices, not two)."""
        return self.architecture != "opt"

    @property
    def attention_params(self) -> int:
        """Weights of one layer's four attention matrices."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

    @property
    def ffn_params(self) -> int:
        """Weights of one feed-forward: the layer's, or one expert's."""
        return (3 if self.gated else 2) * self.hidden * self.ffn

    @property
    def ffns(self) -> int:
        """Feed-forwards in a layer."""
        return self.experts or 1

    @property
    def active_layer_params(self) -> int:
        """Weights of one layer's matrices that one token is multiplied with (without the router)."""
        return self.attention_params + (self.experts_per_token or 1) * self.ffn_params

    def ffns_touched(self, tokens: float) -> float:
        """Feed-forwards of a layer whose weights a batch of so many tokens needs.

        The expected number of distinct experts, when tokens choose alike: E·(1 − (1 − k/E)^tokens).
        """
        if not self.experts:
            return 1.0
        share = self.experts_per_token / self.experts
        return float(self.experts * -math.expm1(tokens * math.log1p(-share))) if share < 1 else self.experts

    @property
    def small_params(self) -> int:
        """Weights of one layer that every GPU holds whole: norms, biases, the experts' router.

        OPT's count is the public DistServe code's 5·hidden, so that its memory table is reproduced.
        """
        if self.architecture == "opt":
            return 5 * self.hidden
        norms = 2 * self.head_dim if self.architecture in ("qwen3", "qwen3_moe") else 0
        return 2 * self.hidden + norms + self.hidden * self.experts

    @property
    def table_params(self) -> int:
        """Weights of one vocabulary table: the embedding, or the output head."""
        return self.vocab * self.hidden

    @property
    def params(self) -> int:
        """All weights."""
        positions = self.max_positions * self.hidden if self.architecture == "opt" else 0
        tables = self.table_params * (1 if self.tied else 2) + positions
        matrices = self.attention_params + self.ffns * self.ffn_params
        return tables + self.layers * (matrices + self.small_params)

    @property
    def active_params(self) -> int:
        """Weights that one token is multiplied with: the layers' (of experts only its own) and one table."""
        return self.layers * self.active_layer_params + self.table_params

    def shape_fault(self, tp: int, pp: int) -> str | None:
        """Why the model cannot be split over tp × pp GPUs, in a clause; None if it can.

        tp divides the heads and the feed-forward (each expert's), pp divides the layers (REFERENCE § 3). KV
        heads are split, or copied when there are fewer of them than tp. Weights quantised in blocks are split
        between blocks only (vLLM refuses the others: vllm-project/vllm#25292).
        """
        if tp < 1 or pp < 1:
            return f"tp and pp are at least 1, not tp {tp} and pp {pp}"
        if self.heads % tp or self.ffn % tp:
            return f"tp {tp} does not divide the {self.heads} heads and the feed-forward of {self.ffn}"
        if self.weight_block and self.ffn // tp % self.weight_block:
            return (
                f"tp {tp} cuts the feed-forward of {self.ffn} into {self.ffn // tp}, which the quantised "
                f"weights' blocks of {self.weight_block} do not divide"
            )
        if self.kv_heads % tp and tp % self.kv_heads:
            return f"tp {tp} neither divides the {self.kv_heads} KV heads nor is a multiple of them"
        if self.layers % pp:
            return f"pp {pp} does not divide the {self.layers} layers"
        return None

    def kv_heads_per_gpu(self, tp: int) -> int:
        """KV heads on one GPU of a tensor-parallel group."""
        return max(1, self.kv_heads // tp)

    def kv_bytes_per_token(self) -> int:
        """KV bytes of one token over all layers: 2·layers·kv_heads·head_dim·bytes (REFERENCE § 2)."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.bytes_per_kv

    def weight_bytes(self, tp: int = 1, pp: int = 1) -> int:
        """Weight bytes on one GPU of the fullest stage (REFERENCE § 2).

        Embedding tables stand whole on every GPU, as in DistServe's engine; with pp > 1 an untied model has
        one table on the first stage and one on the last. Raises `BadShape`.
        """
        if fault := self.shape_fault(tp, pp):
            raise BadShape(f"{self.id} does not take this shape: {fault}")
        layers = self.layers // pp
        kv_share = self.kv_heads_per_gpu(tp) / self.kv_heads
        attention = 2 * self.hidden * self.head_dim * (self.heads / tp + self.kv_heads * kv_share)
        tables = self.table_params * (1 if self.tied or pp > 1 else 2)
        positions = self.max_positions * self.hidden if self.architecture == "opt" else 0
        matrices = round(layers * (attention + self.ffns * self.ffn_params / tp))
        rest = tables + positions + layers * self.small_params
        return self.bytes_per_weight * matrices + self.bytes_per_activation * rest


@dataclasses.dataclass(frozen=True)
class GPU:
    """One GPU product. Rates are the datasheet's dense figures; memory is what CUDA reports as usable."""

    product: str  # the label nvidia.com/gpu.product
    short: str  # for people
    memory_bytes: int
    bf16_flops: float  # dense
    bandwidth_bytes_s: float
    nvlink_bytes_s: float  # one direction; 0 = no NVLink
    pcie_bytes_s: float  # one direction
    rdma_bytes_s: float  # the NIC that nodes of this kind have per GPU, where they have RDMA
    efficiency: str  # key of data/profiles/gpu_op_efficiency.json
    borrowed: bool  # the efficiency curves were measured on another product
    fp8_flops: float = 0.0  # dense; 0 = its tensor cores do no fp8

    @property
    def peer_bytes_s(self) -> float:
        """One-direction bandwidth between two GPUs of a node."""
        return self.nvlink_bytes_s or self.pcie_bytes_s


@dataclasses.dataclass(frozen=True)
class Link:
    """A way for KV from one GPU to another: transfer time = latency + bytes / rate."""

    name: Literal["nvlink", "pcie", "rdma", "tcp", "zmq"]
    bytes_per_s: float
    latency_s: float


# Bandwidths: NVLink per direction from the datasheets (A100 600 GB/s and H100/H200 900 GB/s both ways). RDMA:
# the line rate per GPU (HDR 200 Gb/s in A100 systems, NDR 400 Gb/s in H100/H200 systems). TCP: what vLLM
# users measured between pods that fell back to it, 0.5 GB/s (REFERENCE § 6). Latencies: some CUDA copies, an
# RDMA read with its notification, and a socket round trip with its copies; a small transfer over nixl costs
# about 1 ms (REFERENCE § 7).
NVLINK = Link("nvlink", 300e9, 20e-6)
NVLINK_H100 = Link("nvlink", 450e9, 20e-6)
RDMA_100G = Link("rdma", 12.5e9, 100e-6)
RDMA_200G = Link("rdma", 25e9, 100e-6)
RDMA_400G = Link("rdma", 50e9, 100e-6)
TCP = Link("tcp", 0.5e9, 1e-3)
# Our engine's messages through the memory of the hosts, whatever links their GPUs: at most what ZeroMQ was measured to move
# over loopback, 256 MB at a time and with nothing to copy from or to a GPU; a small transfer took 1.1 ms
# (benchmarks/README.md, KV over TCP and over ZeroMQ).
ZMQ = Link("zmq", 2.4e9, 1e-3)


def pod_link(a: GPU, a_rdma: bool, b: GPU, b_rdma: bool) -> Link:
    """The link between two pods, on one node or on two: RDMA if both nodes have it, else TCP.

    Never NVLink: each pod sees only its own devices (REFERENCE § 6).
    """
    if not (a_rdma and b_rdma):
        return TCP
    return Link("rdma", min(a.rdma_bytes_s, b.rdma_bytes_s), RDMA_400G.latency_s)


def container_link(gpu: GPU, nvlink: bool) -> Link:
    """The link between two servers in one container (low-affinity pair): NVLink if any, else PCIe."""
    if nvlink and gpu.nvlink_bytes_s:
        return Link("nvlink", gpu.nvlink_bytes_s, NVLINK.latency_s)
    return Link("pcie", gpu.pcie_bytes_s, NVLINK.latency_s)


def _opt(name: str, layers: int, hidden: int, heads: int) -> Model:
    # Zhang et al., "OPT: Open Pre-trained Transformer Language Models", table 1; vocabulary and positions
    # from the published config.json. 175B has no public weights under this id.
    return Model(
        f"facebook/opt-{name}",
        "opt",
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=4 * hidden,
        vocab=50272,
        max_positions=2048,
        tied=True,
        source="OPT paper, table 1",
    )


def _llama3(name: str, layers: int, hidden: int, heads: int, ffn: int, max_positions: int) -> Model:
    return Model(
        f"meta-llama/{name}",
        "llama",
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=8,
        head_dim=128,
        ffn=ffn,
        vocab=128256,
        max_positions=max_positions,
        tied=False,
        source="config.json of the model's repository",
    )


def _qwen3(
    name: str, layers: int, hidden: int, heads: int, ffn: int, kv_heads: int = 8, experts: int = 0
) -> tuple[Model, Model]:
    """The model in bf16, and its repository of block-quantised fp8 weights."""
    plain = Model(
        f"Qwen/{name}",
        "qwen3_moe" if experts else "qwen3",
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=128,
        ffn=ffn,
        vocab=151936,
        max_positions=40960,
        tied=False,
        experts=experts,
        experts_per_token=8 if experts else 0,
        source="config.json of the model's repository",
    )
    fp8 = dataclasses.replace(
        plain, id=f"{plain.id}-FP8", bytes_per_weight=1, quantised="fp8", weight_block=128
    )
    return plain, fp8


def _mixtral(tune: str) -> Model:
    return Model(
        f"mistralai/Mixtral-8x7B-{tune}v0.1",
        "mixtral",
        layers=32,
        hidden=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        ffn=14336,
        vocab=32000,
        max_positions=32768,
        tied=False,
        experts=8,
        experts_per_token=2,
        source="config.json of the model's repository",
    )


MODELS: Mapping[str, Model] = {
    m.id: m
    for m in (
        _opt("13b", 40, 5120, 40),
        _opt("30b", 48, 7168, 56),
        _opt("66b", 64, 9216, 72),
        _opt("175b", 96, 12288, 96),
        *(
            _llama3(name + tune, layers, hidden, heads, ffn, positions)
            for name, layers, hidden, heads, ffn, positions in (
                ("Meta-Llama-3-8B", 32, 4096, 32, 14336, 8192),
                ("Meta-Llama-3-70B", 80, 8192, 64, 28672, 8192),
                ("Llama-3.1-8B", 32, 4096, 32, 14336, 131072),
                ("Llama-3.1-70B", 80, 8192, 64, 28672, 131072),
            )
            for tune in ("", "-Instruct")
        ),
        *_qwen3("Qwen3-8B", 36, 4096, 32, 12288),
        *_qwen3("Qwen3-32B", 64, 5120, 64, 25600),
        *_qwen3("Qwen3-30B-A3B", 48, 2048, 32, 768, kv_heads=4, experts=128),
        *_qwen3("Qwen3-235B-A22B", 94, 4096, 64, 1536, kv_heads=4, experts=128),
        _mixtral(""),
        _mixtral("Instruct-"),
    )
}

# Dense bf16, fp8 and bandwidth: NVIDIA's datasheets (A100, H100, H200, L40S). Memory: total_memory as CUDA reports
# it, below the label's MiB because of ECC and the driver; A100-80G's is the 84.99e9 that DistServe's memory
# table was made with (REFERENCE § 2), to the byte: only 84,990,608,000 to 84,990,624,000 give all 76 rows.
# A100-40G's is deviceQuery's, the others are the GiB that CUDA's out-of-memory messages show. Efficiency
# curves were measured on the SXM parts of A100-80G, H100 and H200; every other product borrows the nearest.
GPUS: Mapping[str, GPU] = {
    g.product: g
    for g in (
        GPU(
            "NVIDIA-A100-SXM4-80GB",
            "A100-80G",
            84_990_623_744,
            312e12,
            2.039e12,
            300e9,
            32e9,
            25e9,
            "a100_sxm",
            False,
        ),
        GPU(
            "NVIDIA-A100-SXM4-40GB",
            "A100-40G",
            42_298_834_944,
            312e12,
            1.555e12,
            300e9,
            32e9,
            25e9,
            "a100_sxm",
            True,
        ),
        GPU(
            "NVIDIA-A100-80GB-PCIe",
            "A100-PCIe",
            84_970_000_000,
            312e12,
            1.935e12,
            0.0,
            32e9,
            25e9,
            "a100_sxm",
            True,
        ),
        GPU(
            "NVIDIA-H100-80GB-HBM3",
            "H100",
            84_940_000_000,
            989.4e12,
            3.35e12,
            450e9,
            64e9,
            50e9,
            "h100_sxm",
            False,
            1978.9e12,
        ),
        GPU(
            "NVIDIA-H100-PCIe",
            "H100-PCIe",
            84_930_000_000,
            756e12,
            2.0e12,
            0.0,
            64e9,
            50e9,
            "h100_sxm",
            True,
            1513e12,
        ),
        GPU(
            "NVIDIA-H200",
            "H200",
            150_110_000_000,
            989.4e12,
            4.8e12,
            450e9,
            64e9,
            50e9,
            "h200_sxm",
            False,
            1978.9e12,
        ),
        GPU(
            "NVIDIA-L40S",
            "L40S",
            47_670_000_000,
            362.05e12,
            0.864e12,
            0.0,
            32e9,
            25e9,
            "a100_sxm",
            True,
            733e12,
        ),
    )
}

# Other spellings, without case and punctuation: labels of other drivers, GKE's accelerator label, and the
# instance types of clouds whose nodes have one kind of GPU (REFERENCE § 6 names the fallback labels).
_SPELLINGS: Mapping[str, str] = {
    "a100sxm480gb": "NVIDIA-A100-SXM4-80GB",
    "a10080gb": "NVIDIA-A100-SXM4-80GB",
    "a100sxm80gb": "NVIDIA-A100-SXM4-80GB",
    "p4de24xlarge": "NVIDIA-A100-SXM4-80GB",
    "standardnd96amsra100v4": "NVIDIA-A100-SXM4-80GB",
    "a100sxm440gb": "NVIDIA-A100-SXM4-40GB",
    "teslaa100": "NVIDIA-A100-SXM4-40GB",
    "p4d24xlarge": "NVIDIA-A100-SXM4-40GB",
    "standardnd96asrv4": "NVIDIA-A100-SXM4-40GB",
    "a10080gbpcie": "NVIDIA-A100-80GB-PCIe",
    "a100pcie80gb": "NVIDIA-A100-80GB-PCIe",
    "h10080gbhbm3": "NVIDIA-H100-80GB-HBM3",
    "h10080gb": "NVIDIA-H100-80GB-HBM3",
    "h100mega80gb": "NVIDIA-H100-80GB-HBM3",
    "h100sxm580gb": "NVIDIA-H100-80GB-HBM3",
    "p548xlarge": "NVIDIA-H100-80GB-HBM3",
    "standardnd96isrh100v5": "NVIDIA-H100-80GB-HBM3",
    "h100pcie": "NVIDIA-H100-PCIe",
    "h100pcie80gb": "NVIDIA-H100-PCIe",
    "h200": "NVIDIA-H200",
    "h200141gb": "NVIDIA-H200",
    "h200141gbhbm3e": "NVIDIA-H200",
    "p5e48xlarge": "NVIDIA-H200",
    "p5en48xlarge": "NVIDIA-H200",
    "standardnd96isrh200v5": "NVIDIA-H200",
    "l40s": "NVIDIA-L40S",
}


def model(id: str) -> Model:
    """The model of that id in the catalogue. Raises `UnknownModel`, naming the known ones."""
    try:
        return MODELS[id]
    except KeyError:
        known = ", ".join(m for m in MODELS if not m.endswith("-Instruct"))
        raise UnknownModel(
            f"model {id!r} is not in the catalogue; known are {known}, or give its config.json"
        ) from None


def gpu(product: str) -> GPU:
    """The GPU of that product, by label in any spelling. Raises `UnknownGPU`, naming the known ones."""
    plain = re.sub(r"[^a-z0-9]", "", product.lower()).removeprefix("nvidia")
    for known in GPUS.values():
        if plain in (
            re.sub(r"[^a-z0-9]", "", s.lower()).removeprefix("nvidia") for s in (known.product, known.short)
        ):
            return known
    try:
        return GPUS[_SPELLINGS[plain]]
    except KeyError:
        raise UnknownGPU(
            f"GPU product {product!r} is not in the catalogue; known are {', '.join(GPUS)}"
        ) from None


def kv_blocks(
    model: Model,
    gpu: GPU,
    tp: int,
    pp: int,
    block_tokens: int = BLOCK_TOKENS,
    utilisation: float = MEMORY_UTILISATION,
) -> int:
    """KV blocks that one instance of tp × pp GPUs holds beside its weights; 0 if the weights do not fit.

    REFERENCE § 2, which gives all 76 rows of data/profiles/max_num_tokens.csv. Every block holds
    `block_tokens` tokens on each of the instance's GPUs (its share of heads and layers). Raises `BadShape`.
    """
    free = utilisation * gpu.memory_bytes - ACTIVATION_SHARE * gpu.memory_bytes - model.weight_bytes(tp, pp)
    layers = model.layers // pp
    block_bytes = block_tokens * layers * model.kv_heads_per_gpu(tp) * model.head_dim * 2 * model.bytes_per_kv
    return max(0, int(free // block_bytes))


_DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "half": 2, "float": 4}


def model_from_config(id: str, config: Mapping[str, Any]) -> Model:
    """A model from its Hugging Face config.json.

    OPT, Llama, Qwen3, Qwen3-MoE and Mixtral; bf16, fp16 and fp32, or fp8 and int8 matrices (quant_method fp8,
    or compressed-tensors of 8 bits). Raises `BadModelConfig` naming the field.
    """

    def whole(field: str, default: int | None = None) -> int:
        value = config.get(field, default)
        if value is None:
            raise BadModelConfig(f"config.json of {id}: field {field!r} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise BadModelConfig(f"config.json of {id}: {field} is {value!r}, not a whole number above 0")
        return value

    kind = config.get("model_type")
    if kind not in ("opt", "llama", "qwen3", "mixtral", "qwen3_moe"):
        mla = "; latent attention (MLA) is not in this release" if config.get("kv_lora_rank") else ""
        raise BadModelConfig(
            f"config.json of {id}: model_type is {kind!r}; this release knows opt, llama, qwen3, mixtral and "
            f"qwen3_moe{mla}"
        )
    quantised, block = _quantisation(id, config.get("quantization_config"))
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if dtype not in _DTYPE_BYTES:
        raise BadModelConfig(
            f"config.json of {id}: dtype {dtype!r} is none of {', '.join(sorted(_DTYPE_BYTES))}"
        )
    hidden, heads = whole("hidden_size"), whole("num_attention_heads")
    # Defaults are those of the architecture's configuration class in transformers.
    experts = chosen = 0
    if kind == "opt":
        if (
            whole("word_embed_proj_dim", hidden) != hidden
            or config.get("do_layer_norm_before", True) is not True
        ):
            raise BadModelConfig(
                f"config.json of {id}: OPT with projected embeddings or late norms (350m) is not supported"
            )
        kv_heads, head_dim, ffn = heads, 0, whole("ffn_dim")
    else:
        kv_heads = whole("num_key_value_heads", heads)
        given = config.get("head_dim") is not None
        head_dim = whole("head_dim", 128) if kind in ("qwen3", "qwen3_moe") or given else 0
        ffn = whole("moe_intermediate_size" if kind == "qwen3_moe" else "intermediate_size")
    if kind in ("mixtral", "qwen3_moe"):
        field = "num_local_experts" if kind == "mixtral" else "num_experts"
        experts, chosen = whole(field), whole("num_experts_per_tok")
        if chosen > experts:
            raise BadModelConfig(
                f"config.json of {id}: num_experts_per_tok {chosen} is more than {field} {experts}"
            )
        if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
            raise BadModelConfig(
                f"config.json of {id}: experts in some layers only (mlp_only_layers, decoder_sparse_step) are "
                "not in this release"
            )
    if not head_dim:
        if hidden % heads:
            raise BadModelConfig(
                f"config.json of {id}: num_attention_heads {heads} does not divide hidden_size {hidden}"
            )
        head_dim = hidden // heads
    if heads % kv_heads:
        raise BadModelConfig(
            f"config.json of {id}: num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}"
        )
    return Model(
        id,
        kind,
        layers=whole("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=ffn,
        vocab=whole("vocab_size"),
        max_positions=whole("max_position_embeddings"),
        tied=bool(config.get("tie_word_embeddings", kind == "opt")),
        bytes_per_weight=1 if quantised else _DTYPE_BYTES[dtype],
        bytes_per_activation=_DTYPE_BYTES[dtype],
        bytes_per_kv=_DTYPE_BYTES[dtype],
        experts=experts,
        experts_per_token=chosen,
        quantised=quantised,
        weight_block=block,
        source="config.json given",
    )


def _quantisation(id: str, config: Any) -> tuple[Quantised, int]:
    """What quantization_config says: the type of the matrices, and the side of their blocks (0: no blocks)."""
    if not config:
        return "", 0
    where = f"config.json of {id}: quantization_config"
    if not isinstance(config, Mapping):
        raise BadModelConfig(f"{where} is {config!r}, not an object")
    method = config.get("quant_method")
    block: Any = None
    if method == "fp8":
        kind: Quantised = "fp8"
        block = config.get("weight_block_size")
    elif method == "compressed-tensors":
        groups = config.get("config_groups")
        weights = [
            g.get("weights") if isinstance(g, Mapping) else None
            for g in (groups.values() if isinstance(groups, Mapping) else ())
        ]
        said = {(w.get("type"), w.get("num_bits")) if isinstance(w, Mapping) else None for w in weights}
        if said == {("float", 8)}:
            kind = "fp8"
        elif said == {("int", 8)}:
            kind = "int8"
        else:
            raise BadModelConfig(
                f"{where}.config_groups: this release knows one kind of weights, float or int of 8 bits"
            )
        block = next((w.get("block_structure") for w in weights if w), None)
    else:
        raise BadModelConfig(
            f"{where}.quant_method is {method!r}; this release knows fp8 and compressed-tensors (8 bits), "
            "not gptq, awq or others: give bf16, fp16 or 8-bit weights"
        )
    if block is None:
        return kind, 0
    if (
        not isinstance(block, list)
        or len(block) != 2
        or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in block)
    ):
        raise BadModelConfig(f"{where}: weight blocks are {block!r}, not two whole numbers above 0")
    return kind, max(block)
