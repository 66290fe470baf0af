"""Imported by ranks that are told to compute on "cuda" and find no GPU: their group is gloo's, their tensors lie on the
CPU.
"""

import torch

from mindspeed_cp.doctor import meeting

meeting.BACKENDS["cuda"] = "gloo"
torch.cuda.set_device = lambda device: None
