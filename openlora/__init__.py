"""OpenLoRA: thousands of LoRA fine-tunes of one base model, behind a durable queue."""

__version__ = "0.1.0"
