"""Portable Triton kernels (sm_80 and newer): tensors in, tensors out, nothing registered.

Every launcher takes logical NCHW tensors of any strides and returns channels_last ones. ``_fwd``
computes an operator; ``_bwd``, ``_dgrad`` (of the input) and ``_wgrad`` (of the weight) its gradients.
"""

from . import hopper, tf32
from .activation_bwd import activation_bwd
from .commuted import upconcat_conv3x3_commuted_fwd
from .conv3x3 import conv_fwd, conv_head_fwd, conv_pool_fwd
from .conv_bwd import conv_dgrad, conv_wgrad
from .conv_moments import conv_moments_fwd, upconcat_conv3x3_moments_fwd
from .conv_transpose import conv_transpose_fwd
from .conv_transpose_bwd import conv_transpose_dgrad, conv_transpose_wgrad
from .norm import norm_bwd, norm_fwd
from .stem import STEM_CHANNELS, stem_fwd
from .tuning import HEAD_CHANNELS, HEAD_CLASSES
from .upconcat_conv3x3 import upconcat_conv3x3_fwd
from .upsample_bwd import upsample_bwd
from .upsample_concat import upsample_concat_fwd, upsample_fwd

__all__ = [
    "HEAD_CHANNELS",
    "HEAD_CLASSES",
    "STEM_CHANNELS",
    "activation_bwd",
    "conv_dgrad",
    "conv_fwd",
    "conv_head_fwd",
    "conv_moments_fwd",
    "conv_pool_fwd",
    "conv_transpose_dgrad",
    "conv_transpose_fwd",
    "conv_transpose_wgrad",
    "conv_wgrad",
    "hopper",
    "norm_bwd",
    "norm_fwd",
    "stem_fwd",
    "tf32",
    "upconcat_conv3x3_commuted_fwd",
    "upconcat_conv3x3_fwd",
    "upconcat_conv3x3_moments_fwd",
    "upsample_bwd",
    "upsample_concat_fwd",
    "upsample_fwd",
]
