"""What ``bench mixed`` serves: the demo model, one of the user's, or random weights of a shape."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from openlora.commands.config import cache_dir, process_environment
from openlora.demo.adapters import demo_adapters
from openlora.demo.model import ensure_demo_model
from openlora.errors import SetupError
from openlora.models.config import ModelConfig, read_config
from openlora.models.dummy import DUMMY_CONFIGS
from openlora.models.load import DTYPES

RANK = 16
"""Of the random adapters."""
_BYTES = 256


@dataclass(frozen=True, slots=True)
class Subject:
    """A model and its adapters, the same for the bare engine and for the whole system.

    Attributes:
        model: directory with configuration and tokenizer, and the weights unless they are random.
        adapters: directories; each one's name is the adapter's ID.
        load_format: "auto", or "dummy" for random weights.
        is_demo: `openlora up` serves it when nothing is said.
    """

    name: str
    model: Path
    adapters: tuple[Path, ...]
    load_format: str = "auto"
    is_demo: bool = False

    @property
    def adapter_ids(self) -> tuple[str, ...]:
        """The adapters' names."""
        return tuple(path.name for path in self.adapters)


def demo_subject() -> Subject:
    """The demo model with its five adapters."""
    model = ensure_demo_model(cache_dir(process_environment()))
    return Subject(model.name, model, tuple(demo_adapters()), is_demo=True)


def given_subject(model: Path) -> Subject:
    """A model directory of the user's; without adapters."""
    return Subject(model.name, model, ())


def random_subject(shape: str, adapters: int, dtype: str, directory: Path) -> Subject:
    """A model of random weights and as many random adapters on all its linears.

    Args:
        shape: "8b", "1b", or a directory whose config.json says it.
        dtype: of the adapters' files.
        directory: where they are written, with the model's configuration and a tokenizer of one
            token for each byte.

    Raises:
        SetupError: its vocabulary has no room for those.
    """
    config = DUMMY_CONFIGS[shape] if shape in DUMMY_CONFIGS else read_config(Path(shape))
    if config.vocab_size < _BYTES:
        raise SetupError(f"shape {shape} has {config.vocab_size} tokens; it must have {_BYTES}")
    model = directory / "model"
    write_byte_tokenizer(model, config.vocab_size)
    (model / "config.json").write_text(_config_json(shape, config), encoding="utf-8")
    # Not at the top: it needs numpy, which a demo of the scripted kind goes without.
    from openlora.bench.random_adapters import write_adapter

    def write(number: int) -> Path:
        return write_adapter(
            directory / "adapters" / f"adapter-{number}",
            config,
            rank=RANK,
            seed=number,
            dtype=DTYPES[dtype],
        )

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        written = tuple(threads.map(write, range(adapters)))
    return Subject(Path(shape).name, model, written, load_format="dummy")


def write_byte_tokenizer(directory: Path, vocab_size: int) -> None:
    """Write tokenizer files: bytes are the first 256 tokens, words " w256", " w257", … the rest."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {f"Ġw{token_id}": token_id for token_id in range(len(vocab), vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def _config_json(shape: str, config: ModelConfig) -> str:
    if shape not in DUMMY_CONFIGS:
        return (Path(shape) / "config.json").read_text(encoding="utf-8")
    scaling = config.rope_scaling
    assert scaling is not None  # both shapes are Llama 3's
    return json.dumps(
        {
            "architectures": [config.architecture],
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_theta": config.rope_theta,
            "rope_scaling": {
                "rope_type": scaling.kind,
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_len,
            },
            "max_position_embeddings": config.max_model_len,
            "tie_word_embeddings": config.tie_word_embeddings,
            "eos_token_id": list(config.eos_token_ids),
            "dtype": config.dtype,
        }
    )
