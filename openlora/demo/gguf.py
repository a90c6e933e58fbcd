"""Reads a llama-architecture GGUF file into Hugging Face files: weights, config, tokenizer.

transformers reads GGUF too, and the tests compare this with it. It is not used here because it
parses the file three times, cannot save what it read (the model counts as quantized), loses the
digit rule of this tokenizer, and draws progress bars of its own over the caller's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, TokenType, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
FILES = (
    WEIGHTS_FILE,
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
)

_TOP_LEVEL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFModel:
    """One GGUF file of the llama architecture.

    Raises ValueError where the file is no GGUF, or of another architecture or tokenizer.
    """

    def __init__(self, path: Path) -> None:
        self._reader = GGUFReader(path)
        architecture = self._field("general.architecture")
        if architecture != "llama":
            raise ValueError(f"{path}: architecture {architecture!r}, expected 'llama'")
        if self._field("tokenizer.ggml.pre") != "smollm":
            raise ValueError(f"{path}: expected the 'smollm' tokenizer")

    def _field(self, name: str) -> Any:
        field = self._reader.get_field(name)
        if field is None:
            raise ValueError(f"the GGUF file has no field {name!r}")
        return field.contents()

    def config(self) -> dict[str, Any]:
        """The ``config.json`` of transformers' LlamaForCausalLM."""
        num_heads = self._field("llama.attention.head_count")
        hidden_size = self._field("llama.embedding_length")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "vocab_size": self._field("llama.vocab_size"),
            "hidden_size": hidden_size,
            "intermediate_size": self._field("llama.feed_forward_length"),
            "num_hidden_layers": self._field("llama.block_count"),
            "num_attention_heads": num_heads,
            "num_key_value_heads": self._field("llama.attention.head_count_kv"),
            "head_dim": hidden_size // num_heads,
            "hidden_act": "silu",
            # Stored as fp32; six digits give back the decimal number it was made from.
            "rms_norm_eps": float(f"{self._field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
            "rope_theta": self._field("llama.rope.freq_base"),
            "max_position_embeddings": self._field("llama.context_length"),
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": not any(t.name == "output.weight" for t in self._reader.tensors),
            **self._special_token_ids(),
        }

    def generation_config(self) -> dict[str, Any]:
        """The ``generation_config.json``: the IDs that end a generation, as transformers reads."""
        return self._special_token_ids()

    def _special_token_ids(self) -> dict[str, Any]:
        return {
            "bos_token_id": self._field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._field("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self._field("tokenizer.ggml.padding_token_id"),
        }

    def tensors(self) -> Iterator[tuple[str, torch.Tensor, float]]:
        """Yields (Hugging Face name, dequantised bf16 weight, share of the bytes done after it).

        bf16 is the type that the model was published in, so it costs nothing that the 4-bit
        quantisation of the source file had left, and halves the file and the loading time.
        """
        num_heads = self._field("llama.attention.head_count")
        num_kv_heads = self._field("llama.attention.head_count_kv")
        total_bytes = sum(tensor.n_bytes for tensor in self._reader.tensors)
        done_bytes = 0
        for tensor in self._reader.tensors:
            # A copy: an unquantised tensor comes as a read-only view of the file.
            weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
            if tensor.name.endswith("attn_q.weight"):
                weight = _split_rotary_halves(weight, num_heads)
            elif tensor.name.endswith("attn_k.weight"):
                weight = _split_rotary_halves(weight, num_kv_heads)
            done_bytes += tensor.n_bytes
            share = done_bytes / total_bytes
            yield _hugging_face_name(tensor.name), weight.to(torch.bfloat16).contiguous(), share

    def tokenizer(self) -> Tokenizer:
        """The byte-level BPE tokenizer, with every control token marked special."""
        tokens = self._field("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ", 1)) for merge in self._field("tokenizer.ggml.merges")]
        vocab = {token: index for index, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        # What llama.cpp's name "smollm" stands for: each digit is a word of its own.
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        types = self._field("tokenizer.ggml.token_type")
        tokenizer.add_special_tokens(
            [
                AddedToken(token, special=True, normalized=False)
                for token, kind in zip(tokens, types, strict=True)
                if kind == TokenType.CONTROL
            ]
        )
        return tokenizer

    def tokenizer_config(self) -> dict[str, Any]:
        """The ``tokenizer_config.json``, chat template included."""
        tokens = self._field("tokenizer.ggml.tokens")
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[self._field("tokenizer.ggml.bos_token_id")],
            "eos_token": tokens[self._field("tokenizer.ggml.eos_token_id")],
            "pad_token": tokens[self._field("tokenizer.ggml.padding_token_id")],
            "unk_token": tokens[self._field("tokenizer.ggml.unknown_token_id")],
            "model_max_length": self._field("llama.context_length"),
            "clean_up_tokenization_spaces": False,
            "chat_template": self._field("tokenizer.chat_template"),
        }


def convert(source: Path, target: Path, progress: Callable[[str, float], None]) -> None:
    """Writes ``FILES`` for the GGUF file ``source`` into the existing directory ``target``.

    The fractions passed to ``progress`` are shares of the time measured on two cores.
    """
    progress("reading the model file", 0.0)
    model = GGUFModel(source)
    progress("converting the tokenizer", 0.25)
    model.tokenizer().save(str(target / TOKENIZER_FILE))
    _write_json(target / TOKENIZER_CONFIG_FILE, model.tokenizer_config())
    _write_json(target / CONFIG_FILE, model.config())
    _write_json(target / GENERATION_CONFIG_FILE, model.generation_config())
    weights = {}
    for name, weight, share in model.tensors():
        weights[name] = weight
        progress("converting the weights", 0.4 + 0.5 * share)
    progress("writing the weights", 0.9)
    save_file(weights, target / WEIGHTS_FILE, metadata={"format": "pt"})


def _hugging_face_name(name: str) -> str:
    """``blk.3.attn_q.weight`` → ``model.layers.3.self_attn.q_proj.weight``."""
    parts = name.split(".")
    if parts[0] == "blk":
        _, layer, module, kind = parts
        return f"model.layers.{layer}.{_LAYER_NAMES[module]}.{kind}"
    module, kind = parts
    return f"{_TOP_LEVEL_NAMES[module]}.{kind}"


def _split_rotary_halves(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undoes llama.cpp's row order of a query or key weight of shape (heads · head_dim, in).

    llama.cpp rotates neighbouring rows of a head, transformers rotates row i with row
    i + head_dim/2: [x0 y0 x1 y1 …] → [x0 x1 … y0 y1 …] within each head.
    """
    out_features, in_features = weight.shape
    pairs = weight.view(num_heads, out_features // num_heads // 2, 2, in_features)
    return pairs.transpose(1, 2).reshape(out_features, in_features)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
