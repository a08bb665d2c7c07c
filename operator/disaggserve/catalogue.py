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
import re
from collections.abc import Mapping
from typing import Any, Literal

from disaggserve.api.errors import InvalidInput

Architecture = Literal["opt", "llama", "qwen3"]

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
    """A dense decoder-only transformer. Sizes are in elements unless a name says bytes."""

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
    bytes_per_weight: int = 2
    bytes_per_kv: int = 2
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
        """Weights of one layer's feed-forward matrices."""
        return (3 if self.gated else 2) * self.hidden * self.ffn

    @property
    def small_params(self) -> int:
        """Weights of one layer that every GPU holds whole: norms and biases.

        OPT's count is the public DistServe code's 5·hidden, so that its memory table is reproduced.
        """
        if self.architecture == "opt":
            return 5 * self.hidden
        return 2 * self.hidden + (2 * self.head_dim if self.architecture == "qwen3" else 0)

    @property
    def table_params(self) -> int:
        """Weights of one vocabulary table: the embedding, or the output head."""
        return self.vocab * self.hidden

    @property
    def params(self) -> int:
        """All weights."""
        positions = self.max_positions * self.hidden if self.architecture == "opt" else 0
        tables = self.table_params * (1 if self.tied else 2) + positions
        return tables + self.layers * (self.attention_params + self.ffn_params + self.small_params)

    def shape_fault(self, tp: int, pp: int) -> str | None:
        """Why the model cannot be split over tp × pp GPUs, in a clause; None if it can.

        tp divides the heads and the feed-forward, pp divides the layers (REFERENCE § 3). KV heads are split,
        or copied when there are fewer of them than tp.
        """
        if tp < 1 or pp < 1:
            return f"tp and pp are at least 1, not tp {tp} and pp {pp}"
        if self.heads % tp or self.ffn % tp:
            return f"tp {tp} does not divide the {self.heads} heads and the feed-forward of {self.ffn}"
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
        matrices = round(layers * (attention + self.ffn_params / tp))
        return self.bytes_per_weight * (tables + positions + matrices + layers * self.small_params)


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

    @property
    def peer_bytes_s(self) -> float:
        """One-direction bandwidth between two GPUs of a node."""
        return self.nvlink_bytes_s or self.pcie_bytes_s


@dataclasses.dataclass(frozen=True)
class Link:
    """A way for KV from one GPU to another: transfer time = latency + bytes / rate."""

    name: Literal["nvlink", "pcie", "rdma", "tcp"]
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


def _qwen3(name: str, layers: int, hidden: int, heads: int, ffn: int) -> Model:
    return Model(
        f"Qwen/{name}",
        "qwen3",
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=8,
        head_dim=128,
        ffn=ffn,
        vocab=151936,
        max_positions=40960,
        tied=False,
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
        _qwen3("Qwen3-8B", 36, 4096, 32, 12288),
        _qwen3("Qwen3-32B", 64, 5120, 64, 25600),
    )
}

# Dense bf16 and bandwidth: NVIDIA's datasheets (A100, H100, H200, L40S). Memory: total_memory as CUDA reports
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
        ),
        GPU(
            "NVIDIA-H100-PCIe", "H100-PCIe", 84_930_000_000, 756e12, 2.0e12, 0.0, 64e9, 50e9, "h100_sxm", True
        ),
        GPU("NVIDIA-H200", "H200", 150_110_000_000, 989.4e12, 4.8e12, 450e9, 64e9, 50e9, "h200_sxm", False),
        GPU("NVIDIA-L40S", "L40S", 47_670_000_000, 362.05e12, 0.864e12, 0.0, 32e9, 25e9, "a100_sxm", True),
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

    OPT, Llama and Qwen3 (dense, not quantised). Raises `BadModelConfig` naming the field.
    """

    def whole(field: str, default: int | None = None) -> int:
        value = config.get(field, default)
        if value is None:
            raise BadModelConfig(f"config.json of {id}: field {field!r} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise BadModelConfig(f"config.json of {id}: {field} is {value!r}, not a whole number above 0")
        return value

    kind = config.get("model_type")
    if kind not in ("opt", "llama", "qwen3"):
        raise BadModelConfig(
            f"config.json of {id}: model_type is {kind!r}; this release knows opt, llama and qwen3"
        )
    if config.get("quantization_config"):
        raise BadModelConfig(
            f"config.json of {id}: quantised weights are not in this release; give bf16 or fp16"
        )
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if dtype not in _DTYPE_BYTES:
        raise BadModelConfig(
            f"config.json of {id}: dtype {dtype!r} is none of {', '.join(sorted(_DTYPE_BYTES))}"
        )
    hidden, heads = whole("hidden_size"), whole("num_attention_heads")
    # Defaults are those of the architecture's configuration class in transformers.
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
        head_dim = whole("head_dim", 128) if kind == "qwen3" or config.get("head_dim") is not None else 0
        ffn = whole("intermediate_size")
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
        bytes_per_weight=_DTYPE_BYTES[dtype],
        bytes_per_kv=_DTYPE_BYTES[dtype],
        source="config.json given",
    )
