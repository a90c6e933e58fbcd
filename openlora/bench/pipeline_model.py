"""A tokenizer without a model, for the scripted engine: one word per token, no merges to learn."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from workers.scripted_engine import SCRIPTED_VOCAB_SIZE

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'forbidden' %}{{ raise_exception('no such role') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
)


def write_tokenizer(directory: Path, *, chat: bool = True) -> Path:
    """Write tokenizer files over the scripted engine's whole vocabulary; returns ``directory``.

    Bytes are the first tokens, words " w256", " w257", … the rest. ``chat``: with a chat template.
    """
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for token_id in range(len(vocab), SCRIPTED_VOCAB_SIZE):
        vocab[f"Ġw{token_id}"] = token_id
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if chat:
        config["chat_template"] = CHAT_TEMPLATE
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
