"""Gumbel-softmax for PyTorch, compiled: one fused pass, exact noise, exact gradients."""

from __future__ import annotations

import sys

from gumbel_ext._build_check import load_compiled_module
from gumbel_ext._version import __version__

__all__ = [
    "PatchHandle",
    "__version__",
    "binary_concrete",
    "binary_concrete_log_prob",
    "concrete_log_prob",
    "decoupled_gumbel_softmax",
    "draw_rng_state",
    "gapped_straight_through",
    "gumbel_argmax",
    "gumbel_embedding",
    "gumbel_log_softmax",
    "gumbel_noise",
    "gumbel_rao",
    "gumbel_softmax",
    "gumbel_topk",
    "logistic_noise",
    "logit_binary_concrete",
    "patch_torch",
    "reinmax",
    "relaxed_topk",
    "replay_generators",
    "soft_argmax",
    "soft_argmax_2d",
    "straight_through_softmax",
    "zgr",
]

try:
    load_compiled_module()
except ImportError:
    # `python -m gumbel_ext.info` passes through here too, and it is what one runs to find out why
    # the module does not load. Everybody else gets the error.
    if not (sys.argv[:1] == ["-m"] and "gumbel_ext.info" in sys.orig_argv):
        raise
else:
    # They register what tracing and torch.vmap make of the ops.
    from gumbel_ext import _random_ops as _random_ops
    from gumbel_ext import _vmap as _vmap
    from gumbel_ext import distributions as distributions
    from gumbel_ext import nn as nn
    from gumbel_ext._checkpoint import replay_generators
    from gumbel_ext.binary import (
        binary_concrete,
        binary_concrete_log_prob,
        logistic_noise,
        logit_binary_concrete,
    )
    from gumbel_ext.concrete import concrete_log_prob, gumbel_log_softmax
    from gumbel_ext.deterministic import soft_argmax, soft_argmax_2d, straight_through_softmax
    from gumbel_ext.embedding import gumbel_embedding
    from gumbel_ext.estimators import gapped_straight_through, gumbel_rao, reinmax, zgr
    from gumbel_ext.functional import draw_rng_state, gumbel_argmax, gumbel_noise, gumbel_softmax
    from gumbel_ext.patch import PatchHandle, patch_torch
    from gumbel_ext.temperature import decoupled_gumbel_softmax
    from gumbel_ext.topk import gumbel_topk, relaxed_topk
