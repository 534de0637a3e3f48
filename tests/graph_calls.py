"""Every public function as a function of logits of three dimensions: for what graphs promise.

Each gives a tensor with a gradient, an index as what it chooses of the logits.
"""

from functools import partial

import torch

import gumbel_ext


def chosen(logits, index, dim):
    return logits.gather(dim, index.clamp_min(0))


def sample_and_chosen(x, dim, function, **options):
    y, index = function(x, dim=dim, return_index=True, **options)
    return y + chosen(x, index.unsqueeze(dim), dim)


def argmax(x, dim, **random):
    return chosen(x, gumbel_ext.gumbel_argmax(x, dim, keepdim=True, **random), dim)


def argmax_of_many(x, dim, **random):
    return chosen(x, gumbel_ext.gumbel_argmax(x, dim, num_samples=3, **random), dim)


def topk(x, dim, k=2, **random):
    return chosen(x, gumbel_ext.gumbel_topk(x, k, dim, **random), dim)


def topk_with_log_prob(x, dim, **random):
    index, log_prob = gumbel_ext.gumbel_topk(x, 2, dim, return_log_prob=True, **random)
    return chosen(x, index, dim) + log_prob.unsqueeze(dim)


def noise(x, dim, function, **random):
    return x + function(x.shape, dtype=x.dtype, device=x.device, **random)


def embedding(x, dim, hard, **random):
    rows = torch.arange(2 * x.shape[dim], dtype=x.dtype, device=x.device).sin()
    codebook = rows.view(x.shape[dim], 2) * x.mean()
    return gumbel_ext.gumbel_embedding(x, codebook, 0.7, hard, dim, **random)


def binary(x, dim, hard, **random):
    return gumbel_ext.binary_concrete(x, 0.7, hard, **random)


def log_odds(x, dim, **random):
    return gumbel_ext.logit_binary_concrete(x, 0.7, **random)


def state_in_the_graph(x, dim):
    state = gumbel_ext.draw_rng_state(device=x.device)
    return gumbel_ext.gumbel_softmax(x, 0.7, dim=dim, rng_state=state)


def vmapped(x, dim):
    sample = partial(gumbel_ext.gumbel_softmax, tau=0.7, dim=dim - 1)
    return torch.vmap(sample, randomness="different")(x)


def log_density(x, dim, log_space):
    value = (0.5 * x).log_softmax(dim)
    value = value if log_space else value.exp()
    return gumbel_ext.concrete_log_prob(value, x, 0.7, dim, log_space=log_space)


def binary_density(x, dim, logit_space):
    value = 0.5 * x if logit_space else (0.5 * x).sigmoid()
    return gumbel_ext.binary_concrete_log_prob(value, x, 0.7, logit_space=logit_space)


def soft_argmax_2d(x, dim, normalized):
    return gumbel_ext.soft_argmax_2d(x.movedim(dim, 0), 0.7, normalized=normalized)


soft = partial(gumbel_ext.gumbel_softmax, tau=0.7)
# Each takes logits, dim and an rng_state.
OF_A_STATE = {
    "soft": soft,
    "hard": partial(soft, hard=True),
    "soft_and_index": partial(sample_and_chosen, function=soft),
    "decoupled": partial(gumbel_ext.decoupled_gumbel_softmax, tau_forward=2.0, tau_backward=0.7),
    "argmax": argmax,
    "argmax_of_many": argmax_of_many,
    "topk": topk,
    "topk_with_log_prob": topk_with_log_prob,
    "relaxed_topk": partial(gumbel_ext.relaxed_topk, k=2, tau=0.7),
    "gumbel_noise": partial(noise, function=gumbel_ext.gumbel_noise),
    "logistic_noise": partial(noise, function=gumbel_ext.logistic_noise),
    "binary_soft": partial(binary, hard=False),
    "binary_hard": partial(binary, hard=True),
    "binary_logit": log_odds,
    "log_softmax": partial(gumbel_ext.gumbel_log_softmax, tau=0.7),
    "embedding_soft": partial(embedding, hard=False),
    "embedding_hard": partial(embedding, hard=True),
    "gumbel_rao": partial(sample_and_chosen, function=gumbel_ext.gumbel_rao, tau=0.7, k=3),
    "zgr": partial(sample_and_chosen, function=gumbel_ext.zgr),
    "reinmax": partial(sample_and_chosen, function=gumbel_ext.reinmax, tau=0.7),
    "gapped": partial(
        sample_and_chosen, function=gumbel_ext.gapped_straight_through, tau=0.7, gap=0.5
    ),
    "gapped_by_probability": partial(
        sample_and_chosen, function=gumbel_ext.gapped_straight_through, tau=0.7, gap=None
    ),
}
# The others take logits and dim.
DRAWING = {**OF_A_STATE, "draw_rng_state": state_in_the_graph, "vmap": vmapped}
WITHOUT_NOISE = {
    "concrete_density": partial(log_density, log_space=False),
    "concrete_log_density": partial(log_density, log_space=True),
    "binary_density": partial(binary_density, logit_space=False),
    "binary_log_odds_density": partial(binary_density, logit_space=True),
    "straight_through_softmax": partial(
        sample_and_chosen, function=gumbel_ext.straight_through_softmax, tau=0.7
    ),
    "soft_argmax": partial(gumbel_ext.soft_argmax, beta=0.7),
    "soft_argmax_2d": partial(soft_argmax_2d, normalized=True),
    "soft_argmax_2d_in_pixels": partial(soft_argmax_2d, normalized=False),
}
EVERY = {**DRAWING, **WITHOUT_NOISE}
