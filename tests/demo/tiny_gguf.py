"""Writes a GGUF file of the demo model's kind, thousands of times smaller."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

NUM_LAYERS = 2
HIDDEN_SIZE = 64
INTERMEDIATE_SIZE = 96
NUM_HEADS = 4
NUM_KV_HEADS = 2
HEAD_DIM = HIDDEN_SIZE // NUM_HEADS
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# " b" and "11": the second may not be used where each digit is a word of its own.
MERGES = ("Ġ b", "1 1")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny_gguf(path: Path) -> None:
    """Random fp32 weights, 64 hidden, all 256 bytes as tokens."""
    tokens = [*SPECIAL_TOKENS, *sorted(ByteLevel.alphabet()), "Ġb", "11"]
    control, normal = int(gguf.TokenType.CONTROL), int(gguf.TokenType.NORMAL)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(NUM_LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN_SIZE)
    writer.add_feed_forward_length(INTERMEDIATE_SIZE)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([control if t in SPECIAL_TOKENS else normal for t in tokens])
    writer.add_token_merges(list(MERGES))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, shape in _shapes(len(tokens)).items():
        weight = np.random.default_rng(len(name)).standard_normal(shape, dtype=np.float32)
        writer.add_tensor(f"{name}.weight", 0.1 * weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _shapes(vocab_size: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (vocab_size, HIDDEN_SIZE),
        "output_norm": (HIDDEN_SIZE,),
    }
    for layer in range(NUM_LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm": (HIDDEN_SIZE,),
            f"blk.{layer}.attn_q": (HIDDEN_SIZE, HIDDEN_SIZE),
            f"blk.{layer}.attn_k": (NUM_KV_HEADS * HEAD_DIM, HIDDEN_SIZE),
            f"blk.{layer}.attn_v": (NUM_KV_HEADS * HEAD_DIM, HIDDEN_SIZE),
            f"blk.{layer}.attn_output": (HIDDEN_SIZE, HIDDEN_SIZE),
            f"blk.{layer}.ffn_norm": (HIDDEN_SIZE,),
            f"blk.{layer}.ffn_gate": (INTERMEDIATE_SIZE, HIDDEN_SIZE),
            f"blk.{layer}.ffn_up": (INTERMEDIATE_SIZE, HIDDEN_SIZE),
            f"blk.{layer}.ffn_down": (HIDDEN_SIZE, INTERMEDIATE_SIZE),
        }
    return shapes
