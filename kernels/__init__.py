"""Portable Triton kernels (sm_80 and newer): tensors in, tensors out, nothing registered.

Every launcher takes logical NCHW tensors of any strides and returns channels_last ones.
"""

from . import hopper
from .conv3x3 import conv_fwd, conv_pool_fwd
from .conv_transpose2x2 import conv_transpose2x2_fwd
from .stem import STEM_CHANNELS, stem_fwd
from .upconcat_conv3x3 import upconcat_conv3x3_fwd
from .upsample_concat import upsample_concat_fwd

__all__ = [
    "STEM_CHANNELS",
    "conv_fwd",
    "conv_pool_fwd",
    "conv_transpose2x2_fwd",
    "hopper",
    "stem_fwd",
    "upconcat_conv3x3_fwd",
    "upsample_concat_fwd",
]
