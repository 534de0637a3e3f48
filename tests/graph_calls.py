"""Every public function as a function of logits [rows, classes, columns]: for what graphs promise.

Classes lie in dimension 1. Each gives a tensor with a gradient, an index as what it chooses of the
logits.
"""

from functools import partial

import torch

import gumbel_ext

DIM = 1


def chosen(logits, index):
    return logits.gather(DIM, index.clamp_min(0))


def with_index(x, function, **options):
    y, index = function(x, dim=DIM, return_index=True, **options)
    return y + chosen(x, index.unsqueeze(DIM))


def argmax(x, **options):
    return chosen(x, gumbel_ext.gumbel_argmax(x, DIM, keepdim=True, **options))


def argmax_of_many(x, **options):
    return chosen(x, gumbel_ext.gumbel_argmax(x, DIM, num_samples=3, **options))


def topk(x, **options):
    return chosen(x, gumbel_ext.gumbel_topk(x, 2, DIM, **options))


def topk_with_log_prob(x, **options):
    index, log_prob = gumbel_ext.gumbel_topk(x, 2, DIM, return_log_prob=True, **options)
    return chosen(x, index) + log_prob.unsqueeze(DIM)


def noise(x, function, **options):
    return x + function(x.shape, dtype=x.dtype, device=x.device, **options)


def embedding(x, hard, **options):
    rows = torch.arange(2 * x.shape[DIM], dtype=x.dtype, device=x.device).sin()
    codebook = rows.view(x.shape[DIM], 2) * x.mean()
    return gumbel_ext.gumbel_embedding(x, codebook, 0.7, hard, DIM, **options)


def state_in_the_graph(x):
    return gumbel_ext.gumbel_softmax(
        x, 0.7, dim=DIM, rng_state=gumbel_ext.draw_rng_state(device=x.device)
    )


def vmapped(x, **options):
    sample = partial(gumbel_ext.gumbel_softmax, tau=0.7, dim=DIM - 1, **options)
    return torch.vmap(sample, randomness="different")(x)


def log_density(x, log_space):
    value = (0.5 * x).log_softmax(DIM)
    value = value if log_space else value.exp()
    density = gumbel_ext.concrete_log_prob(value, x, 0.7, DIM, log_space=log_space)
    return density.unsqueeze(DIM)


soft = partial(gumbel_ext.gumbel_softmax, tau=0.7, dim=DIM)
# Each also takes an rng_state.
OF_A_STATE = {
    "soft": soft,
    "hard": partial(soft, hard=True),
    "soft_and_index": partial(with_index, function=gumbel_ext.gumbel_softmax, tau=0.7),
    "decoupled": partial(
        gumbel_ext.decoupled_gumbel_softmax, tau_forward=2.0, tau_backward=0.7, dim=DIM
    ),
    "argmax": argmax,
    "argmax_of_many": argmax_of_many,
    "topk": topk,
    "topk_with_log_prob": topk_with_log_prob,
    "relaxed_topk": partial(gumbel_ext.relaxed_topk, k=2, tau=0.7, dim=DIM),
    "gumbel_noise": partial(noise, function=gumbel_ext.gumbel_noise),
    "logistic_noise": partial(noise, function=gumbel_ext.logistic_noise),
    "binary_soft": partial(gumbel_ext.binary_concrete, tau=0.7),
    "binary_hard": partial(gumbel_ext.binary_concrete, tau=0.7, hard=True),
    "log_softmax": partial(gumbel_ext.gumbel_log_softmax, tau=0.7, dim=DIM),
    "embedding_soft": partial(embedding, hard=False),
    "embedding_hard": partial(embedding, hard=True),
    "gumbel_rao": partial(with_index, function=gumbel_ext.gumbel_rao, tau=0.7, k=3),
    "zgr": partial(with_index, function=gumbel_ext.zgr),
    "reinmax": partial(with_index, function=gumbel_ext.reinmax, tau=0.7),
    "gapped": partial(with_index, function=gumbel_ext.gapped_straight_through, tau=0.7, gap=0.5),
    "gapped_by_probability": partial(
        with_index, function=gumbel_ext.gapped_straight_through, tau=0.7, gap=None
    ),
}
DRAWING = {**OF_A_STATE, "draw_rng_state": state_in_the_graph, "vmap": vmapped}
WITHOUT_NOISE = {
    "concrete_density": partial(log_density, log_space=False),
    "concrete_log_density": partial(log_density, log_space=True),
    "binary_density": lambda x: gumbel_ext.binary_concrete_log_prob((0.5 * x).sigmoid(), x, 0.7),
    "straight_through_softmax": partial(
        with_index, function=gumbel_ext.straight_through_softmax, tau=0.7
    ),
    "soft_argmax": lambda x: gumbel_ext.soft_argmax(x, 0.7, DIM, keepdim=True),
    "soft_argmax_2d": lambda x: gumbel_ext.soft_argmax_2d(x, 0.7),
    "soft_argmax_2d_in_pixels": lambda x: gumbel_ext.soft_argmax_2d(x, 0.7, normalized=False),
}
EVERY = {**DRAWING, **WITHOUT_NOISE}
