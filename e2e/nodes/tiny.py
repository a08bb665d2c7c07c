"""Tiny models of real architectures: seeded weights in safetensors and a tokenizer trained on the spot.

They stand in for the real weights on simulated nodes and in tests; nothing is downloaded. The folder has the
Hugging Face layout (`config.json`, `model.safetensors`, `tokenizer.json`, `tokenizer_config.json`), so that
transformers loads it too and can be the oracle.
"""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

VOCABULARY = 768
"""Size of the tokenizer: the special tokens, 256 bytes, and merges."""

_TEXT = """
A user asks a question and the assistant answers it, one token after another. The first token should come
soon, and the others should follow at a steady pace. When the prompt is long, the prefill takes most of the
time; when the answer is long, the decode does. These two kinds of work disturb each other when they share a
graphics processor, so they are given processors of their own, and the keys and values of the prompt are
moved from the one to the other over a fast link. How many processors are needed for this traffic? That
depends on the model, on the promise, and on the requests that arrive. What is the capital of France? The
capital of France is Paris. Write a short story about a lighthouse keeper who finds a message in a bottle.
Once upon a time there was a keeper who lived alone on a rock in the sea. Please summarise the following
text in three sentences. Explain the difference between a list and a tuple in Python, and give an example:
The weather today is sunny with a high of 21 degrees. Translate this sentence into German. Thank you very
much for your help! You are welcome; is there anything else that I can do for you? First, open the file.
Second, read every line. Third, count the words, and print the ten most frequent ones together with how
often each of them was seen. In 1969 the first people walked on the moon; in 1989 the web was proposed;
since then the world has become smaller and much louder.
def add(a, b): return a + b
for i in range(10): print(i, add(i, 2 * i))
"""

_OPT_CHAT = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
_QWEN_CHAT = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_LLAMA_CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)


class TinyModelError(ValueError):
    """A tiny model of the id that was asked for cannot be made."""


def make_tiny(
    model_id: str, folder: Path, *, hidden: int = 32, layers: int = 1, heads: int = 2, seed: int = 0
) -> Path:
    """Write a tiny model of `model_id`'s architecture and context length into `folder` and return the folder.

    OPT ids give OPT (FFN 4 × hidden, tied embeddings), Llama and Qwen3 ids theirs with `heads // 2` KV heads;
    a Qwen3's heads are twice as wide as hidden / heads, and up to 4B its embeddings are tied. Same arguments,
    same weights. A folder that already holds this very model is left as it is; several processes
    may ask at once. The special tokens' rows of the output embedding are zero, so that greedy decoding
    practically never ends by itself.

    Raises TinyModelError for another architecture or a shape that does not divide.
    """
    if hidden % heads:
        raise TinyModelError(f"hidden {hidden} is not a multiple of heads {heads}")
    family = _family(model_id)
    if family != "opt" and heads % 2:
        raise TinyModelError(f"heads {heads} is odd; {model_id} needs two query heads per KV head")
    folder = Path(folder)
    recipe = {
        "model": model_id,
        "hidden": hidden,
        "layers": layers,
        "heads": heads,
        "seed": seed,
        "format": 1,
    }
    marker = folder / "tiny.json"

    def is_there() -> bool:
        return marker.is_file() and json.loads(marker.read_text()) == recipe

    if is_there():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        specials = _SPECIALS[family]
        tokenizer = _tokenizer(family, specials)
        tokenizer.save(str(draft / "tokenizer.json"))
        (draft / "tokenizer_config.json").write_text(
            json.dumps(_tokenizer_config(model_id, family), indent=1)
        )
        vocab = tokenizer.get_vocab_size()
        config = _config(model_id, family, hidden=hidden, layers=layers, heads=heads, vocab=vocab)
        (draft / "config.json").write_text(json.dumps(config, indent=1))
        generator = np.random.default_rng(seed)
        make = _opt_weights if family == "opt" else _llama_weights
        weights = {
            name: np.ascontiguousarray(value)
            for name, value in make(config, generator, len(specials)).items()
        }
        save_file(weights, draft / "model.safetensors", metadata={"format": "pt"})
        (draft / "tiny.json").write_text(json.dumps(recipe))
        draft.chmod(0o755)
        if folder.exists() and not is_there():
            shutil.rmtree(folder)
        try:
            os.rename(draft, folder)
        except OSError:
            # Somebody put a copy there first, and may be reading it: the same recipe gives the same model.
            if not is_there():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _family(model_id: str) -> str:
    name = model_id.lower().rsplit("/", 1)[-1]
    if name.startswith("opt"):
        return "opt"
    if "llama" in name:
        return "llama"
    if re.fullmatch(r"qwen3-[0-9.]+b(-base)?", name):
        return "qwen3"
    raise TinyModelError(
        f"no tiny model for {model_id!r}: ids of OPT, Llama and dense Qwen3 models are known"
    )


def _context_length(model_id: str, family: str) -> int:
    if family == "opt":
        return 2048
    if family == "qwen3":
        return 40960
    name = model_id.lower()
    if any(version in name for version in ("3.1", "3.2", "3.3")):
        return 131072
    return 8192 if "llama-3" in name else 4096


_SPECIALS = {
    "opt": ("<s>", "<pad>", "</s>", "<unk>"),
    "llama": (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ),
    "qwen3": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
}
"""Special tokens in the order of their ids, from 0. As with the real ones, OPT's prompt begins with </s> and Qwen3's with nothing."""


def _tokenizer(family: str, specials: tuple[str, ...]) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=1,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in specials],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT.splitlines(), trainer)
    if family == "qwen3":
        return tokenizer
    first = "</s>" if family == "opt" else "<|begin_of_text|>"
    tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A",
        pair=f"{first} $A {first} $B",
        special_tokens=[(first, specials.index(first))],
    )
    return tokenizer


def _tokenizer_config(model_id: str, family: str) -> dict[str, Any]:
    common = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": _context_length(model_id, family),
        "clean_up_tokenization_spaces": False,
    }
    if family == "opt":
        names = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
        return {**common, **names, "chat_template": _OPT_CHAT}
    if family == "qwen3":
        return {
            **common,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "chat_template": _QWEN_CHAT,
        }
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|end_of_text|>"}
    return {**common, **names, "chat_template": _LLAMA_CHAT}


def _config(
    model_id: str, family: str, *, hidden: int, layers: int, heads: int, vocab: int
) -> dict[str, Any]:
    context = _context_length(model_id, family)
    if family == "opt":
        return {
            "architectures": ["OPTForCausalLM"],
            "model_type": "opt",
            "activation_function": "relu",
            "hidden_size": hidden,
            "word_embed_proj_dim": hidden,
            "ffn_dim": 4 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "max_position_embeddings": context,
            "vocab_size": vocab,
            "do_layer_norm_before": True,
            "enable_bias": True,
            "layer_norm_elementwise_affine": True,
            "_remove_final_layer_norm": False,
            "tie_word_embeddings": True,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "bos_token_id": 2,
            "eos_token_id": 2,
            "pad_token_id": 1,
            "torch_dtype": "float32",
        }
    own: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": hidden // heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": [1, 4],
    }
    if family == "qwen3":
        own = {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "head_dim": 2 * hidden // heads,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": model_id.lower().removesuffix("-base").endswith(("-0.6b", "-1.7b", "-4b")),
            "use_sliding_window": False,
            "eos_token_id": 2,
        }
    return {
        **own,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "max_position_embeddings": context,
        "vocab_size": vocab,
        "attention_bias": False,
        "torch_dtype": "float32",
    }


_Weights = dict[str, NDArray[np.float32]]


def _normal(generator: np.random.Generator, *shape: int, std: float) -> NDArray[np.float32]:
    return generator.normal(0.0, std, shape).astype(np.float32)


def _opt_weights(config: dict[str, Any], generator: np.random.Generator, specials: int) -> _Weights:
    hidden, ffn = config["hidden_size"], config["ffn_dim"]
    # The branches outweigh the residual: otherwise tied embeddings make every token repeat itself.
    wide = 3.0 / hidden**0.5
    embeddings = _normal(generator, config["vocab_size"], hidden, std=0.5)
    embeddings[:specials] = 0.0
    weights: _Weights = {
        "model.decoder.embed_tokens.weight": embeddings,
        # Two rows more than positions: OPT's offset.
        "model.decoder.embed_positions.weight": _normal(
            generator, config["max_position_embeddings"] + 2, hidden, std=0.5
        ),
        "model.decoder.final_layer_norm.weight": 1.0 + _normal(generator, hidden, std=0.1),
        "model.decoder.final_layer_norm.bias": _normal(generator, hidden, std=0.1),
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"model.decoder.layers.{layer}."
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"):
            weights[f"{at}{name}.weight"] = _normal(generator, hidden, hidden, std=wide)
            weights[f"{at}{name}.bias"] = _normal(generator, hidden, std=0.1)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            weights[f"{at}{name}.weight"] = 1.0 + _normal(generator, hidden, std=0.1)
            weights[f"{at}{name}.bias"] = _normal(generator, hidden, std=0.1)
        weights[f"{at}fc1.weight"] = _normal(generator, ffn, hidden, std=wide)
        weights[f"{at}fc1.bias"] = _normal(generator, ffn, std=0.1)
        weights[f"{at}fc2.weight"] = _normal(generator, hidden, ffn, std=wide)
        weights[f"{at}fc2.bias"] = _normal(generator, hidden, std=0.1)
    return weights


def _llama_weights(config: dict[str, Any], generator: np.random.Generator, specials: int) -> _Weights:
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv, wide_q = (config[k] * config["head_dim"] for k in ("num_key_value_heads", "num_attention_heads"))
    wide = 3.0 / hidden**0.5
    head = _normal(generator, vocab, hidden, std=0.5)
    head[:specials] = 0.0
    weights: _Weights = {
        "model.embed_tokens.weight": _normal(generator, vocab, hidden, std=0.5),
        "model.norm.weight": 1.0 + _normal(generator, hidden, std=0.1),
    }
    if config["tie_word_embeddings"]:
        weights["model.embed_tokens.weight"][:specials] = 0.0
    else:
        weights["lm_head.weight"] = head
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes = {
            "self_attn.q_proj": (wide_q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, wide_q),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }
        for name, shape in shapes.items():
            weights[f"{at}{name}.weight"] = _normal(generator, *shape, std=wide)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{at}{name}.weight"] = 1.0 + _normal(generator, hidden, std=0.1)
        if config["model_type"] == "qwen3":
            for name in ("q_norm", "k_norm"):
                weights[f"{at}self_attn.{name}.weight"] = 1.0 + _normal(
                    generator, config["head_dim"], std=0.1
                )
    return weights
