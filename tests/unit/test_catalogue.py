"""The catalogue's figures against their sources."""

import csv
from pathlib import Path

import pytest

from disaggserve import catalogue
from disaggserve.catalogue import BadModelConfig, BadShape, UnknownGPU, UnknownModel

DATA = Path(catalogue.__file__).parent / "data"
A100 = catalogue.gpu("NVIDIA-A100-SXM4-80GB")


def max_num_tokens():
    with (DATA / "profiles/max_num_tokens.csv").open() as f:
        return [(r["model"], int(r["tp"]), int(r["pp"]), int(r["max_num_tokens"])) for r in csv.DictReader(f)]


def test_the_memory_table_has_76_rows():
    assert len(max_num_tokens()) == 76


@pytest.mark.parametrize(("model", "tp", "pp", "tokens"), max_num_tokens())
def test_kv_blocks_give_the_published_memory_table(model, tp, pp, tokens):
    assert 16 * catalogue.kv_blocks(catalogue.model(model), A100, tp, pp) == tokens


def test_weights_that_do_not_fit_leave_no_blocks():
    assert catalogue.kv_blocks(catalogue.model("facebook/opt-66b"), A100, 1, 1) == 0


@pytest.mark.parametrize(
    ("model", "kv_bytes", "billions"),
    [
        ("facebook/opt-13b", 819_200, 12.85),
        ("facebook/opt-30b", 1_376_256, 29.97),
        ("facebook/opt-66b", 2_359_296, 65.71),
        ("facebook/opt-175b", 4_718_592, 174.6),
        ("meta-llama/Meta-Llama-3-8B", 131_072, 8.03),
        ("meta-llama/Meta-Llama-3-70B", 327_680, 70.55),
        ("Qwen/Qwen3-8B", 147_456, 8.19),
        ("Qwen/Qwen3-32B", 262_144, 32.76),
        ("Qwen/Qwen3-30B-A3B", 98_304, 30.53),
        ("Qwen/Qwen3-235B-A22B", 192_512, 235.09),
        ("mistralai/Mixtral-8x7B-v0.1", 131_072, 46.70),
    ],
)
def test_kv_bytes_and_parameters(model, kv_bytes, billions):
    m = catalogue.model(model)
    assert m.kv_bytes_per_token() == kv_bytes
    assert m.params / 1e9 == pytest.approx(billions, abs=0.01)
    assert m.source


def test_weights_on_one_gpu_are_all_the_weights():
    for m in catalogue.MODELS.values():
        if not m.quantised:
            assert m.weight_bytes(1, 1) == 2 * m.params


@pytest.mark.parametrize(
    ("model", "parameters"),
    # As the repositories' safetensors hold them, in bf16 (their final norms, which we leave out, are in it).
    [
        ("meta-llama/Meta-Llama-3-8B", 8_030_261_248),
        ("meta-llama/Meta-Llama-3-70B", 70_553_706_496),
        ("Qwen/Qwen3-32B", 32_762_123_264),
        ("Qwen/Qwen3-30B-A3B", 30_532_122_624),
        ("mistralai/Mixtral-8x7B-v0.1", 46_702_792_704),
    ],
)
def test_weights_are_the_published_ones(model, parameters):
    assert catalogue.model(model).weight_bytes() == pytest.approx(2 * parameters, rel=1e-5)


def test_eight_bit_weights_leave_tables_norms_and_router_as_they_are():
    # Qwen3-30B-A3B-FP8: 48·(18,874,368 + 128·4,718,592) = 29,896,998,912 bytes of matrices; two tables of
    # 151,936·2,048 and per layer 2·2,048 + 2·128 norms and a router of 2,048·128, in bf16: 1,270,243,328 bytes.
    assert catalogue.model("Qwen/Qwen3-30B-A3B-FP8").weight_bytes() == 29_896_998_912 + 1_270_243_328


def test_experts_are_all_in_memory_and_few_in_a_step():
    m = catalogue.model("mistralai/Mixtral-8x7B-v0.1")
    # 12.88e9 active of 46.7e9 less the embedding table, which a token only looks up in.
    assert m.active_params == 32 * (41_943_040 + 2 * 176_160_768) + 32_000 * 4_096
    assert [round(m.ffns_touched(n), 3) for n in (1, 2, 4)] == [2.0, 3.5, 5.469]  # 8·(1 − 0.75ⁿ)
    assert m.weight_bytes(2, 1) == pytest.approx(m.weight_bytes() / 2, rel=0.01)
    assert catalogue.model("facebook/opt-13b").ffns_touched(64) == 1


def test_block_quantised_weights_are_split_between_blocks():
    fp8 = catalogue.model("Qwen/Qwen3-30B-A3B-FP8")
    assert fp8.shape_fault(2, 1) is None
    assert "blocks of 128" in (fp8.shape_fault(4, 1) or "")
    assert catalogue.model("Qwen/Qwen3-30B-A3B").shape_fault(4, 1) is None


def test_splitting_never_adds_weights_or_takes_blocks():
    llama = catalogue.model("meta-llama/Meta-Llama-3-70B")
    h100 = catalogue.gpu("NVIDIA-H100-80GB-HBM3")
    weights = [llama.weight_bytes(tp, 1) for tp in (1, 2, 4, 8)]
    assert weights == sorted(weights, reverse=True)
    # Beyond its 8 KV heads tensor parallelism copies them: KV per GPU no longer shrinks.
    assert llama.kv_heads_per_gpu(8) == llama.kv_heads_per_gpu(16) == 1
    assert catalogue.kv_blocks(llama, h100, 2, 1) < catalogue.kv_blocks(llama, h100, 4, 1)


@pytest.mark.parametrize(
    ("tp", "pp", "words"),
    [(3, 1, "tp 3"), (1, 3, "pp 3"), (0, 1, "at least 1"), (1, -1, "at least 1")],
)
def test_a_shape_that_does_not_divide_the_model_says_what_does_not(tp, pp, words):
    m = catalogue.model("facebook/opt-13b")
    assert words in (m.shape_fault(tp, pp) or "")
    with pytest.raises(BadShape, match="facebook/opt-13b does not take this shape"):
        m.weight_bytes(tp, pp)


def test_shapes_of_the_paper_are_allowed():
    for model, shapes in {
        "facebook/opt-13b": [(2, 1), (1, 1)],
        "facebook/opt-66b": [(4, 1), (2, 2), (3, 1)],
        "facebook/opt-175b": [(3, 3), (4, 3)],
    }.items():
        assert [catalogue.model(model).shape_fault(*s) for s in shapes] == [None] * len(shapes)


@pytest.mark.parametrize(
    ("label", "product"),
    [
        ("NVIDIA-A100-SXM4-80GB", "NVIDIA-A100-SXM4-80GB"),
        ("A100-SXM4-80GB", "NVIDIA-A100-SXM4-80GB"),
        ("nvidia-a100-80gb", "NVIDIA-A100-SXM4-80GB"),
        ("A100-80G", "NVIDIA-A100-SXM4-80GB"),
        ("p4d.24xlarge", "NVIDIA-A100-SXM4-40GB"),
        ("NVIDIA-A100-PCIE-80GB", "NVIDIA-A100-80GB-PCIe"),
        ("NVIDIA-A100-80GB-PCIe", "NVIDIA-A100-80GB-PCIe"),
        ("NVIDIA-H100-80GB-HBM3", "NVIDIA-H100-80GB-HBM3"),
        ("H100", "NVIDIA-H100-80GB-HBM3"),
        ("NVIDIA-H100-PCIe", "NVIDIA-H100-PCIe"),
        ("NVIDIA-H200", "NVIDIA-H200"),
        ("NVIDIA-L40S", "NVIDIA-L40S"),
    ],
)
def test_gpu_labels_in_their_spellings(label, product):
    assert catalogue.gpu(label).product == product


def test_every_spelling_names_a_known_gpu():
    assert set(catalogue._SPELLINGS.values()) <= set(catalogue.GPUS)


def test_what_is_unknown_names_what_is_known():
    with pytest.raises(UnknownModel, match="facebook/opt-13b"):
        catalogue.model("facebook/opt-14b")
    with pytest.raises(UnknownGPU, match="NVIDIA-H200"):
        catalogue.gpu("NVIDIA-B300")


def test_only_gpus_of_other_curves_are_borrowed():
    assert {g.short for g in catalogue.GPUS.values() if not g.borrowed} == {"A100-80G", "H100", "H200"}
    assert catalogue.gpu("NVIDIA-L40S").efficiency == "a100_sxm"


def test_links():
    a100, h100 = A100, catalogue.gpu("H100")
    assert catalogue.pod_link(a100, True, a100, True) == catalogue.RDMA_200G
    assert catalogue.pod_link(h100, True, h100, True) == catalogue.RDMA_400G
    assert catalogue.pod_link(h100, True, a100, True).bytes_per_s == 25e9
    assert catalogue.pod_link(h100, True, h100, False) == catalogue.TCP
    assert catalogue.container_link(a100, True) == catalogue.NVLINK
    assert catalogue.container_link(h100, True) == catalogue.NVLINK_H100
    assert catalogue.container_link(catalogue.gpu("NVIDIA-L40S"), True).name == "pcie"


# config.json as the repositories publish them, less what no one reads.
OPT = {
    "model_type": "opt",
    "hidden_size": 5120,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "ffn_dim": 20480,
    "vocab_size": 50272,
    "max_position_embeddings": 2048,
    "word_embed_proj_dim": 5120,
    "do_layer_norm_before": True,
    "torch_dtype": "float16",
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
QWEN = LLAMA | {
    "model_type": "qwen3",
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "head_dim": 128,
    "intermediate_size": 25600,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}


QWEN_FP8 = QWEN | {
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
}
QWEN_MOE = QWEN | {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
MIXTRAL = LLAMA | {
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
}


def compressed(kind, bits):
    weights = {"type": kind, "num_bits": bits, "strategy": "channel", "symmetric": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}}


@pytest.mark.parametrize(
    ("id", "config"),
    [
        ("facebook/opt-13b", OPT),
        ("meta-llama/Meta-Llama-3-8B", LLAMA),
        ("Qwen/Qwen3-32B", QWEN),
        ("Qwen/Qwen3-32B-FP8", QWEN_FP8),
        ("Qwen/Qwen3-30B-A3B", QWEN_MOE),
        ("mistralai/Mixtral-8x7B-v0.1", MIXTRAL),
    ],
)
def test_a_config_gives_the_catalogue_s_own_model(id, config):
    assert catalogue.model_from_config(id, config) == catalogue.model(id)


def test_a_float32_config_counts_four_bytes():
    m = catalogue.model_from_config("x", LLAMA | {"torch_dtype": "float32"})
    assert (m.bytes_per_weight, m.bytes_per_activation, m.bytes_per_kv) == (4, 4, 4)


@pytest.mark.parametrize(("kind", "quantised"), [("float", "fp8"), ("int", "int8")])
def test_compressed_tensors_of_eight_bits(kind, quantised):
    m = catalogue.model_from_config("x", LLAMA | compressed(kind, 8))
    assert (m.quantised, m.bytes_per_weight, m.bytes_per_activation, m.bytes_per_kv) == (quantised, 1, 2, 2)
    assert m.weight_block == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_experts_per_tok": 200}, "num_experts_per_tok 200 is more than num_experts 128"),
        ({"num_experts": None}, "'num_experts' is missing"),
        ({"mlp_only_layers": [0]}, "experts in some layers only"),
        ({"decoder_sparse_step": 2}, "experts in some layers only"),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, "deepseek_v3.*latent attention"),
    ],
)
def test_a_bad_config_of_experts_names_the_field(change, words):
    with pytest.raises(BadModelConfig, match=words):
        catalogue.model_from_config("some/model", QWEN_MOE | change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gemma"}, "model_type is 'gemma'"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_attention_heads": "32"}, "num_attention_heads is '32'"),
        ({"num_key_value_heads": 5}, "num_key_value_heads 5 does not divide"),
        ({"hidden_size": 4100}, "does not divide hidden_size 4100"),
        ({"torch_dtype": "int3"}, "dtype 'int3'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method is 'gptq'"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quant_method is 'awq'"),
        ({"quantization_config": "fp8"}, "quantization_config is 'fp8'"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}}, "weight blocks"),
        (compressed("int", 4), "config_groups"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "config_groups"),
    ],
)
def test_a_bad_config_names_the_field(change, words):
    with pytest.raises(BadModelConfig, match=words):
        catalogue.model_from_config("some/model", LLAMA | change)


def test_opt_350m_is_refused():
    with pytest.raises(BadModelConfig, match="350m"):
        catalogue.model_from_config("facebook/opt-350m", OPT | {"word_embed_proj_dim": 512})


def test_every_data_file_stands_in_the_readme():
    text = (DATA / "README.md").read_text()
    missing = [
        f.name for f in DATA.rglob("*") if f.is_file() and f.name != "README.md" and f.name not in text
    ]
    assert missing == []
