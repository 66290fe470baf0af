"""What knows Megatron at run time and patches nothing: groups, records of batches, documents, the bridge to attention."""
