"""Which of the supported models the CUDA operations can run. Pure."""

from __future__ import annotations

from openlora.errors import UnknownModel
from openlora.models.config import ModelConfig


def check_cuda_model(config: ModelConfig) -> None:
    """Refuse a model with anything that ``CudaOps`` does not compute.

    Raises:
        UnknownModel: naming all that is missing.
    """
    missing = missing_on_cuda(config)
    if missing:
        raise UnknownModel(
            f"{config.architecture} needs {', '.join(missing)}, which the CUDA kernels do not "
            "have; use device 'cpu'"
        )


def missing_on_cuda(config: ModelConfig) -> list[str]:
    """What the model needs and ``CudaOps`` lacks, in words."""
    scaling = config.rope_scaling
    features = {
        f"attention windows (below a context of {config.sliding_window} there are none: lower "
        "max_model_len)": bool(config.sliding_window),
        "soft-capped attention": bool(config.attention_soft_cap),
        "an attention scale of its own": config.query_pre_attn_scalar
        not in (None, config.head_dim),
        "QK-norm": config.qk_norm,
        "GELU": config.hidden_act != "silu",
        "partial rotary embeddings": config.rotary_dim != config.head_dim,
        "two rotary embeddings": config.local_rope_theta is not None,
        "a rotary attention factor": scaling is not None and scaling.attention_factor != 1.0,
    }
    return [feature for feature, needed in features.items() if needed]
