"""The built-in backbone: a real Qwen2.5-VL in miniature, and how it was made."""
