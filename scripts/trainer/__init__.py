"""The embedded trainer: GPT with megatron-core only, with tensor, pipeline, data and context parallelism."""
