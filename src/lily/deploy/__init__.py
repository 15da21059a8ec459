"""How is an adapter deployed? Collapsed to static routing, then merged, or written as LoRA, GGUF or stock adapter."""
