"""How does it leave? Collapsed to static routing, then merged, or written as a LoRA, GGUF or stock adapter."""
