"""Code that uses Megatron at run time but patches nothing: groups, batches, documents, the bridge to attention."""
