"""The embedded trainer: GPT on megatron-core alone, with tensor, pipeline, data and context parallelism."""
