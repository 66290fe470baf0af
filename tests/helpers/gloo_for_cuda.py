"""Imported by ranks whose device is "cuda" but which have no GPU: they use gloo and CPU tensors."""

import torch

from mindspeed_cp.doctor import meeting

meeting.BACKENDS["cuda"] = "gloo"
torch.cuda.set_device = lambda device: None
