"""The categorical VAE of examples/categorical_vae.py, trained with four estimators of its gradient.

    python examples/vae_estimators.py [--steps N] [--seed N] [--seeds N] [--threads N] [--out DIR]

The negative ELBO is E_q[-log p(x|z)] + KL(q(z|x) || p(z)). The KL is exact for all; the estimators
differ in the derivative of the first term in the logits of q(z|x), f(z) being -log p(x|z):

- soft: f at the Gumbel-softmax sample, differentiated through it (Jang et al. 2016, arXiv
  1611.01144; Maddison et al. 2016, arXiv 1611.00712). Of low variance, but of a relaxed model.
- straight-through: f at the one-hot sample, differentiated as if it were the soft one (Jang et al.,
  section 2.2). f is that of the discrete model; the gradient is biased.
- moving average: the score function, (f(z) - b) d log q(z), with b a moving average of f (Williams
  1992). Unbiased, one sample.
- leave-one-out: the same over several samples, b the mean of f at the others (Kool et al. 2019,
  "Buy 4 REINFORCE samples, get a baseline for free!"). Unbiased.

Each has its learning rate chosen on a fifth of the training images, with a seed apart, and is then
trained on all of them, on the same batches from the same weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from categorical_vae import (
    BATCH,
    CLASSES,
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

LEARNING_RATES = (2e-3, 4e-3, 8e-3)
SEARCH_SEED = 1000
LEAVE_ONE_OUT_SAMPLES = 4
BASELINE_DECAY = 0.95

Estimator = Callable[[CategoricalVAE, Tensor, Tensor, float], Tensor]
"""(model, x, logits, tau) -> (batch,), whose gradient estimates that of E_q[-log p(x|z)]."""


def gumbel_softmax_estimate(
    model: CategoricalVAE, x: Tensor, logits: Tensor, tau: float, hard: bool
) -> Tensor:
    """The loss at a sample that can be differentiated: relaxed, or straight-through."""
    z = gumbel_ext.gumbel_softmax(logits, tau, hard)
    return negative_log_likelihood(model.decode(z), x)


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


# Made anew for each training: one of them has a state.
ESTIMATORS: dict[str, Callable[[], Estimator]] = {
    "Gumbel-softmax, soft": lambda: functools.partial(gumbel_softmax_estimate, hard=False),
    "Gumbel-softmax, straight-through": lambda: functools.partial(
        gumbel_softmax_estimate, hard=True
    ),
    "score function, moving average": MovingAverageEstimate,
    f"score function, leave-one-out, {LEAVE_ONE_OUT_SAMPLES} samples": lambda: (
        leave_one_out_estimate
    ),
}


def train(
    estimator: Estimator, learning_rate: float, x_train: Tensor, steps: int, seed: int
) -> CategoricalVAE:
    """Returns the model after `steps` steps; weights, batches and samples are those of `seed`."""
    torch.manual_seed(seed)
    model = CategoricalVAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)
    for step, batch in enumerate(batches(len(x_train), BATCH, steps, seed)):
        x = x_train[batch]
        logits = model.encode(x)
        estimate = estimator(model, x, logits, temperature(step, steps))
        loss = (estimate + kl_weight(step, steps) * kl_to_uniform(logits)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def choose_learning_rate(make: Callable[[], Estimator], digits: Digits, steps: int) -> float:
    """Returns the one whose model bounds the validation images best."""
    parts = validation_split(digits)

    def score(learning_rate: float) -> float:
        model = train(make(), learning_rate, parts.x_train, steps, SEARCH_SEED)
        return test_negative_elbo(model, parts.x_test, samples=10).mean().item()

    return min(LEARNING_RATES, key=score)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains with every estimator and seed, prints the table, writes the file."""
    arguments = parse_arguments(
        "Categorical VAE on 8x8 digits, by estimator of the gradient.", argv, steps=2000, seeds=3
    )
    digits = load_binary_digits()
    results = Results(
        "vae_estimators",
        [
            Column("learning_rate", "learning rate", 3),
            Column("test_nats", "test, nats", 2),
            Column("train_nats", "training images, nats", 2),
        ],
        arguments.seeds,
        {"steps": arguments.steps, "threads": arguments.threads},
    )
    learning_rates = {
        name: choose_learning_rate(make, digits, arguments.steps)
        for name, make in ESTIMATORS.items()
    }
    for seed in results.each_seed(arguments.out):
        for name, make in ESTIMATORS.items():
            model = train(make(), learning_rates[name], digits.x_train, arguments.steps, seed)
            results.add(
                name,
                learning_rate=learning_rates[name],
                test_nats=test_negative_elbo(model, digits.x_test, TEST_SAMPLES).mean().item(),
                train_nats=test_negative_elbo(model, digits.x_train, samples=10).mean().item(),
            )
    results.show()


if __name__ == "__main__":
    main()
