"""Hopper kernels in Gluon (sm_90a): the launchers of the portable ones, for what TMA can address."""

from .conv3x3 import (
    conv_dgrad,
    conv_fwd,
    conv_head_fwd,
    conv_moments_fwd,
    conv_pool_fwd,
    conv_transpose_fwd,
    upconcat_conv3x3_commuted_fwd,
    upconcat_conv3x3_fwd,
    upconcat_conv3x3_moments_fwd,
)
from .tuning import (
    PARITY_SIZE,
    TUNED_SIZES,
    HopperConfig,
    hopper_configs,
    layer_configs,
    why_not,
    why_not_dgrad,
    why_not_layer,
)

__all__ = [
    "PARITY_SIZE",
    "TUNED_SIZES",
    "HopperConfig",
    "conv_dgrad",
    "conv_fwd",
    "conv_head_fwd",
    "conv_moments_fwd",
    "conv_pool_fwd",
    "conv_transpose_fwd",
    "hopper_configs",
    "layer_configs",
    "upconcat_conv3x3_commuted_fwd",
    "upconcat_conv3x3_fwd",
    "upconcat_conv3x3_moments_fwd",
    "why_not",
    "why_not_dgrad",
    "why_not_layer",
]
