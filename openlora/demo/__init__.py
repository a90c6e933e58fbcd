"""The demo: a small real chat model, LoRA adapters for it, and how both are made."""
