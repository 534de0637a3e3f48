"""A call of every operator and its gradients: for what all of them promise of a device."""

from dataclasses import dataclass
from functools import partial

import torch

import gumbel_ext

OPS = torch.ops.gumbel_ext
DIM = {"last": -1, "middle": 1}
# Shapes and dim of calls of the core that are launched in different ways.
REGIMES = {
    "tiny": ((20, 10), -1),
    "rows": ((64, 1000), -1),
    "clusters": ((70, 20_000), -1),
    "split_row": ((1, 70_001), -1),
    "columns": ((3, 40, 33), 1),
}


@dataclass(frozen=True)
class Inputs:
    """What the calls are given. Logits are [4, 3, 100], or classes are in the middle."""

    logits: torch.Tensor
    tau: torch.Tensor
    mask: torch.Tensor
    codebook: torch.Tensor
    dim: int

    def to(self, device):
        def moved(t):
            t = t.detach().to(device)
            return t.requires_grad_() if t.is_floating_point() else t

        return Inputs(*map(moved, (self.logits, self.tau, self.mask, self.codebook)), self.dim)


def draw_inputs(where="last", dtype=torch.float32):
    """On the CPU, for ``Inputs.to``."""
    dim = DIM[where]
    logits = torch.randn(4, 3, 100).movedim(-1, dim)
    tau = 0.5 + torch.rand(4, 3, 1).movedim(-1, dim)
    mask = torch.rand(4, 3, 100).movedim(-1, dim) < 0.9
    codebook = torch.randn(2, 50, 5)
    wide = torch.promote_types(dtype, torch.float32)
    return Inputs(
        logits.to(dtype).contiguous(),
        tau.to(wide).contiguous(),
        mask.contiguous(),
        codebook.to(dtype),
        dim,
    )


def with_gradients(y, *inputs):
    """``y`` and its gradients under weights that no generator and no host has a part in."""
    weight = torch.arange(y.numel(), device=y.device).remainder_(7).sub_(3).to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, inputs, weight.view(y.shape))


def softmax(x, function, hard=False, **random):
    y, index = function(x.logits, x.tau, hard, dim=x.dim, mask=x.mask, return_index=True, **random)
    return index, *with_gradients(y, x.logits, x.tau)


def decoupled(x, **random):
    y = gumbel_ext.decoupled_gumbel_softmax(x.logits, 2.0, x.tau, dim=x.dim, **random)
    return with_gradients(y, x.logits, x.tau)


def part(x, **random):
    """Every second of more rows, whose positions need a table: positions are told to ops alone."""
    state = random.pop("rng_state", None)
    generator = random.pop("generator", None)
    rows = x.logits.detach().movedim(x.dim, -1).contiguous()
    places = [700, 800, 200, 1]
    y, index, _ = OPS.gumbel_softmax(
        rows, 0.5, None, False, -1, None, True, generator, state, places
    )
    return y, index, OPS.gumbel_topk(rows, 3, -1, None, generator, state, places)


def noise_at(x, rng_state):
    position = torch.arange(12, device=x.logits.device) * 1000
    return (OPS.noise_at(x.logits.detach().flatten()[:0], position, rng_state),)


def index_alone(x, function, *numbers, **random):
    return (function(x.logits.detach(), *numbers, dim=x.dim, mask=x.mask, **random),)


def topk_with_log_prob(x, **random):
    index, log_prob = gumbel_ext.gumbel_topk(
        x.logits, 4, x.dim, mask=x.mask, return_log_prob=True, **random
    )
    return index, *with_gradients(log_prob, x.logits)


def relaxed_topk(x, **random):
    return with_gradients(
        gumbel_ext.relaxed_topk(x.logits, 3, x.tau, dim=x.dim, **random), x.logits
    )


def noise(x, function, **random):
    return (function(x.logits.shape, dtype=x.logits.dtype, device=x.logits.device, **random),)


def binary(x, hard, **random):
    y = gumbel_ext.binary_concrete(x.logits, x.tau, hard, **random)
    return with_gradients(y, x.logits, x.tau)


def binary_logit(x, **random):
    y = gumbel_ext.logit_binary_concrete(x.logits, x.tau, **random)
    return with_gradients(y, x.logits, x.tau)


def log_sample(x, **random):
    y = gumbel_ext.gumbel_log_softmax(x.logits, x.tau, x.dim, **random)
    return with_gradients(y, x.logits, x.tau)


def embedding(x, hard, **random):
    y, index = gumbel_ext.gumbel_embedding(
        x.logits, x.codebook, x.tau, hard, x.dim, return_index=True, **random
    )
    return index, *with_gradients(y, x.logits, x.codebook, x.tau)


def estimator(x, function, tempered=True, **options):
    tau = {"tau": x.tau.detach()} if tempered else {}
    y, index = function(x.logits, dim=x.dim, mask=x.mask, return_index=True, **tau, **options)
    return index, *with_gradients(y, x.logits)


def concrete_density(x, log_space):
    value = x.logits.detach().log_softmax(x.dim)
    value = (value if log_space else value.exp()).requires_grad_()
    density = gumbel_ext.concrete_log_prob(value, x.logits, x.tau, x.dim, log_space=log_space)
    return with_gradients(density, value, x.logits, x.tau)


def binary_density(x):
    value = x.logits.detach().sigmoid().requires_grad_()
    density = gumbel_ext.binary_concrete_log_prob(value, x.logits, x.tau)
    return with_gradients(density, value, x.logits, x.tau)


def straight_through(x):
    y, index = gumbel_ext.straight_through_softmax(
        x.logits, x.tau, x.dim, mask=x.mask, return_index=True
    )
    return index, *with_gradients(y, x.logits, x.tau)


def soft_argmax(x):
    return with_gradients(gumbel_ext.soft_argmax(x.logits, x.tau, x.dim), x.logits, x.tau)


# Each takes Inputs, and a generator or an rng_state.
DRAWING = {
    "soft": partial(softmax, function=gumbel_ext.gumbel_softmax),
    "hard": partial(softmax, function=gumbel_ext.gumbel_softmax, hard=True),
    "decoupled": decoupled,
    "part": part,
    "argmax": partial(index_alone, function=gumbel_ext.gumbel_argmax),
    "argmax_of_many": partial(index_alone, function=gumbel_ext.gumbel_argmax, num_samples=5),
    "topk_in_rounds": partial(index_alone, function=partial(gumbel_ext.gumbel_topk, k=7)),
    "topk_sorted": partial(index_alone, function=partial(gumbel_ext.gumbel_topk, k=80)),
    "topk_log_prob": topk_with_log_prob,
    "relaxed_topk": relaxed_topk,
    "gumbel_noise": partial(noise, function=gumbel_ext.gumbel_noise),
    "logistic_noise": partial(noise, function=gumbel_ext.logistic_noise),
    "binary_soft": partial(binary, hard=False),
    "binary_hard": partial(binary, hard=True),
    "binary_logit": binary_logit,
    "log_softmax": log_sample,
    "embedding_soft": partial(embedding, hard=False),
    "embedding_hard": partial(embedding, hard=True),
    "gumbel_rao": partial(estimator, function=gumbel_ext.gumbel_rao, k=5),
    "zgr": partial(estimator, function=gumbel_ext.zgr, tempered=False),
    "reinmax": partial(estimator, function=gumbel_ext.reinmax),
    "gapped": partial(estimator, function=gumbel_ext.gapped_straight_through),
}
# Takes Inputs and an rng_state.
OF_A_STATE = {**DRAWING, "noise_at": noise_at}
# Take Inputs alone.
WITHOUT_NOISE = {
    "concrete_density": partial(concrete_density, log_space=False),
    "concrete_log_density": partial(concrete_density, log_space=True),
    "binary_density": binary_density,
    "straight_through_softmax": straight_through,
    "soft_argmax": soft_argmax,
}
