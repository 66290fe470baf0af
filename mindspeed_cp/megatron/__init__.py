"""What knows Megatron at run time and patches nothing: groups, batches, documents, the bridge to attention."""
