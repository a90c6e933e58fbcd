"""LoRA adapters: reading PEFT directories, storing them by content, and paging their weights."""
