"""Stand-ins for what a machine lacks: torch.cuda on a CPU, what Megatron needs on an NPU, Triton, libraries."""
