"""Tensor operations that models are made of: attention, RoPE, linear layers, LoRA."""
