"""Stand-ins for what a machine lacks: torch.cuda on a CPU, Megatron's needs on an NPU, triton, libraries."""
