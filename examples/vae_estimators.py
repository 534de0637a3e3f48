"""The categorical VAE of examples/categorical_vae.py, trained with each estimator of its gradient.

    python examples/vae_estimators.py [--steps N] [--seed N] [--seeds N] [--threads N] [--out DIR]

The negative ELBO is E_q[-log p(x|z)] + KL(q(z|x) || p(z)). The KL is exact for all; the estimators
differ in the derivative of the first term in the logits of q(z|x), f(z) being -log p(x|z):

- soft: f at the Gumbel-softmax sample, differentiated through it (Jang et al. 2016, arXiv
  1611.01144; Maddison et al. 2016, arXiv 1611.00712). Of low variance, but of a relaxed model.
- straight-through and its relatives: f at the one-hot sample, and in the place of the sample's
  derivative, which is none, that of softmax(logits) (Bengio et al. 2013, arXiv 1308.3432), that of
  the soft sample (Jang et al., section 2.2), the mean of the latter over K draws of the noise given
  the sample (Gumbel-Rao, Paulus et al. 2020, arXiv 2010.04838), its limit at tau -> 0 (ZGR,
  Shekhovtsov 2023), ReinMax (Liu et al. 2023, arXiv 2304.08612) or the gapped straight-through one
  (Fan et al. 2022, arXiv 2206.07235). f is that of the discrete model; the gradient is biased.
- moving average: the score function, (f(z) - b) d log q(z), with b a moving average of f (Williams
  1992). Unbiased, one sample.
- leave-one-out: the same over several samples, b the mean of f at the others (Kool et al. 2019,
  "Buy 4 REINFORCE samples, get a baseline for free!"). Unbiased.

Each has its learning rate, then its last temperature chosen on a fifth of the training images, with
a seed apart, and is then trained on all of them, on the same batches from the same weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from categorical_vae import (
    BATCH,
    CLASSES,
    TAU_MIN,
    TEST_SAMPLES,
    CategoricalVAE,
    kl_to_uniform,
    kl_weight,
    temperature,
    test_negative_elbo,
)
from digits import Digits, batches, load_binary_digits, negative_log_likelihood, validation_split
from results import Column, Results, parse_arguments
from torch import Tensor

import gumbel_ext

LEARNING_RATES = (4e-3, 8e-3)
TEMPERATURES = (0.25, 0.5, 1.0)
SEARCH_SEED = 1000
LEAVE_ONE_OUT_SAMPLES = 4
BASELINE_DECAY = 0.95

Estimator = Callable[[CategoricalVAE, Tensor, Tensor, float], Tensor]
"""(model, x, logits, tau) -> (batch,), whose gradient estimates that of E_q[-log p(x|z)]."""


Sampler = Callable[[Tensor, float], Tensor]
"""(logits, tau) -> samples that can be differentiated, one-hot or relaxed."""


def straight_through(logits: Tensor, tau: float) -> Tensor:
    """Returns one-hot samples with the derivative of softmax(logits); tau has no effect."""
    z = F.one_hot(gumbel_ext.gumbel_argmax(logits.detach()), CLASSES)
    p = logits.softmax(-1)
    return z + (p - p.detach())


def estimate_through(
    model: CategoricalVAE, x: Tensor, logits: Tensor, tau: float, sample: Sampler
) -> Tensor:
    """The loss at a sample that can be differentiated."""
    return negative_log_likelihood(model.decode(sample(logits, tau)), x)


def score_function_terms(
    model: CategoricalVAE, x: Tensor, logits: Tensor, samples: int
) -> tuple[Tensor, Tensor]:
    """Returns -log p(x|z) and log q(z|x), both (samples, batch), at samples of q."""
    index = gumbel_ext.gumbel_argmax(logits.detach().expand(samples, *logits.shape))
    loss = negative_log_likelihood(model.decode(F.one_hot(index, CLASSES).to(x.dtype)), x)
    log_q = F.log_softmax(logits, -1).expand(samples, *logits.shape)
    return loss, log_q.gather(-1, index.unsqueeze(-1)).sum((-2, -1))


def with_score(loss: Tensor, log_q: Tensor, baseline: Tensor | float) -> Tensor:
    """Returns the loss, to whose gradient the score function's is added: (batch,)."""
    advantage = loss.detach() - baseline
    # The difference is zero, and so is what it adds to the value.
    return (loss + advantage * (log_q - log_q.detach())).mean(0)


class MovingAverageEstimate:
    """The score function of one sample, less a moving average of the loss."""

    def __init__(self) -> None:
        self.baseline: float | None = None

    def __call__(self, model: CategoricalVAE, x: Tensor, logits: Tensor, tau: float) -> Tensor:
        """The temperature has no effect: the samples are discrete."""
        loss, log_q = score_function_terms(model, x, logits, samples=1)
        mean = loss.mean().item()
        # Of the batches before this one: its own losses would make the gradient biased.
        baseline = mean if self.baseline is None else self.baseline
        self.baseline = BASELINE_DECAY * baseline + (1 - BASELINE_DECAY) * mean
        return with_score(loss, log_q, baseline)


def leave_one_out_estimate(model: CategoricalVAE, x: Tensor, logits: Tensor, tau: float) -> Tensor:
    """The score function of several samples, each less the mean loss of the others.

    The temperature has no effect: the samples are discrete.
    """
    loss, log_q = score_function_terms(model, x, logits, LEAVE_ONE_OUT_SAMPLES)
    fixed = loss.detach()
    return with_score(loss, log_q, (fixed.sum(0) - fixed) / (LEAVE_ONE_OUT_SAMPLES - 1))


@dataclass(frozen=True)
class Method:
    """An estimator, made anew for each training as one of them has a state, and what is tuned."""

    make: Callable[[], Estimator]
    has_temperature: bool


def through(sample: Sampler, has_temperature: bool = True) -> Method:
    """Returns the method that differentiates through samples."""
    return Method(lambda: functools.partial(estimate_through, sample=sample), has_temperature)


METHODS: dict[str, Method] = {
    "Gumbel-softmax, soft": through(gumbel_ext.gumbel_softmax),
    "Gumbel-softmax, straight-through": through(
        functools.partial(gumbel_ext.gumbel_softmax, hard=True)
    ),
    "Gumbel-Rao, K = 10": through(functools.partial(gumbel_ext.gumbel_rao, k=10)),
    "Gumbel-Rao, K = 100": through(functools.partial(gumbel_ext.gumbel_rao, k=100)),
    "ZGR": through(lambda logits, tau: gumbel_ext.zgr(logits), has_temperature=False),
    "ReinMax": through(gumbel_ext.reinmax),
    "gapped straight-through": through(gumbel_ext.gapped_straight_through),
    "straight-through": through(straight_through, has_temperature=False),
    "score function, moving average": Method(MovingAverageEstimate, has_temperature=False),
    f"score function, leave-one-out, {LEAVE_ONE_OUT_SAMPLES} samples": Method(
        lambda: leave_one_out_estimate, has_temperature=False
    ),
}


@dataclass(frozen=True)
class Settings:
    """What is chosen for each method: the last temperature is None where there is none."""

    learning_rate: float
    last_temperature: float | None


def train(
    estimator: Estimator, settings: Settings, x_train: Tensor, steps: int, seed: int
) -> CategoricalVAE:
    """Returns the model after `steps` steps; weights, batches and samples are those of `seed`."""
    torch.manual_seed(seed)
    model = CategoricalVAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate, fused=True)
    last = settings.last_temperature or 1.0
    for step, batch in enumerate(batches(len(x_train), BATCH, steps, seed)):
        x = x_train[batch]
        logits = model.encode(x)
        estimate = estimator(model, x, logits, temperature(step, steps, last))
        loss = (estimate + kl_weight(step, steps) * kl_to_uniform(logits)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def choose_settings(method: Method, digits: Digits, steps: int) -> Settings:
    """Returns those whose model bounds the validation images best."""
    parts = validation_split(digits)

    @functools.cache
    def score(settings: Settings) -> float:
        model = train(method.make(), settings, parts.x_train, steps, SEARCH_SEED)
        return test_negative_elbo(model, parts.x_test, samples=10).mean().item()

    first = Settings(LEARNING_RATES[0], TAU_MIN if method.has_temperature else None)
    best = min((replace(first, learning_rate=rate) for rate in LEARNING_RATES), key=score)
    if not method.has_temperature:
        return best
    return min((replace(best, last_temperature=last) for last in TEMPERATURES), key=score)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains with every estimator and seed, prints the table, writes the file."""
    arguments = parse_arguments(
        "Categorical VAE on 8x8 digits, by estimator of the gradient.", argv, steps=1000, seeds=5
    )
    digits = load_binary_digits()
    results = Results(
        "vae_estimators",
        [
            Column("learning_rate", "learning rate", 3),
            Column("last_temperature", "last τ", 2),
            Column("test_nats", "test, nats", 2),
            Column("train_nats", "training images, nats", 2),
        ],
        arguments.seeds,
        {"steps": arguments.steps, "threads": arguments.threads},
    )
    chosen = {
        name: choose_settings(method, digits, arguments.steps) for name, method in METHODS.items()
    }
    for seed in results.each_seed(arguments.out):
        for name, method in METHODS.items():
            settings = chosen[name]
            model = train(method.make(), settings, digits.x_train, arguments.steps, seed)
            values = {
                "learning_rate": settings.learning_rate,
                "test_nats": test_negative_elbo(model, digits.x_test, TEST_SAMPLES).mean().item(),
                "train_nats": test_negative_elbo(model, digits.x_train, samples=10).mean().item(),
            }
            if settings.last_temperature is not None:
                values["last_temperature"] = settings.last_temperature
            results.add(name, **values)
    results.show()


if __name__ == "__main__":
    main()
