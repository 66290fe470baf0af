"""Silences Megatron's warnings about parts that are not used here; import it before Megatron."""

import warnings

warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*not installed")
warnings.filterwarnings("ignore", message="full scope is deprecated")
warnings.filterwarnings("ignore", message=".*we are deprecating ShardedTensor")
warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS")
warnings.filterwarnings("ignore", message=".*core_attn is from transformer_engine")
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
