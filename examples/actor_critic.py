"""An actor-critic with discrete actions on CartPole, by estimator of the policy's gradient.

    python examples/actor_critic.py [--steps N] [--seed N] [--seeds N] [--threads N] [--out DIR]

Learnt from a replay buffer, with two critics Q_1, Q_2 of state and one-hot action and their
slowly moving copies. With the entropy bonus of soft actor-critic (Haarnoja et al. 2018, arXiv
1801.01290; for discrete actions Christodoulou 2019, arXiv 1910.07207), the critics fit

    r + gamma E_pi[min_i Q_i(s', a') - alpha log pi(a'|s')],

the expectation being a sum over the actions, and the policy is to increase

    J(s) = E_pi[Q(s, a)] + alpha H(pi(.|s)),   Q = min_i Q_i.

The methods differ in the derivative of E_pi[Q(s, a)] alone:

- straight-through: Q at a one-hot Gumbel-softmax sample, differentiated through it as through the
  soft sample, so that it is the critic's derivative in its action that improves the policy (Lowe et
  al. 2017, "MADDPG", arXiv 1706.02275).
- score function: (Q(s, a) - b(s)) d log pi(a|s) at a sampled action, b(s) = Q(s, a') at a second,
  independent one: a policy gradient with a sampled baseline.
- expectation: the sum over the actions, as in the discrete soft actor-critic. What the others
  estimate; possible here because two actions are few.

All runs of a seed start from the same weights and the same environment.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
from categorical_vae import perceptron
from results import Column, Results, parse_arguments
from torch import Tensor, nn

import gumbel_ext

ENVIRONMENT = "CartPole-v1"
OBSERVATIONS = 4
ACTIONS = 2
LONGEST_EPISODE = 500

HIDDEN = 64
BATCH = 128
RANDOM_STEPS = 500
STEPS_PER_UPDATE = 2
LEARNING_RATE = 1e-3
DISCOUNT = 0.99
TARGET_RATE = 0.01
ENTROPY_WEIGHT = 1.0
TAU = 1.0
TEST_EPISODES = 20
# Apart from those that the training's environments are seeded with.
TEST_SEED = 10_000


class Critic(nn.Module):
    """Q(s, a), a function of state and action, both inputs of one network."""

    def __init__(self) -> None:
        super().__init__()
        self.network = perceptron(OBSERVATIONS + ACTIONS, HIDDEN, 1)

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        """Returns (...) for state (..., OBSERVATIONS) and action (..., ACTIONS)."""
        value: Tensor = self.network(torch.cat([state, action], -1)).squeeze(-1)
        return value


class LinearCritic(nn.Module):
    """Q(s, a) = sum_k a_k q_k(s), with an output of the network for each action."""

    def __init__(self) -> None:
        super().__init__()
        self.network = perceptron(OBSERVATIONS, HIDDEN, ACTIONS)

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        """Returns (...) for state (..., OBSERVATIONS) and action (..., ACTIONS)."""
        value: Tensor = (self.network(state) * action).sum(-1)
        return value


class TwoCritics(nn.Module):
    """Two critics: the smaller value of the two is less prone to be too large."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.second = kind(), kind()

    def minimum(self, state: Tensor, action: Tensor) -> Tensor:
        """Returns min_i Q_i(s, a): (...)."""
        return torch.minimum(self.first(state, action), self.second(state, action))

    def of_all_actions(self, state: Tensor) -> Tensor:
        """Returns min_i Q_i(s, .): (batch, ACTIONS)."""
        actions = torch.eye(ACTIONS).expand(len(state), -1, -1)
        return self.minimum(state.unsqueeze(1).expand(-1, ACTIONS, -1), actions)


PolicyGradient = Callable[[TwoCritics, Tensor, Tensor], Tensor]
"""(critics, state, logits of the policy) -> (batch,), whose gradient is that of E_pi[Q(s, a)]."""


def straight_through(critics: TwoCritics, state: Tensor, logits: Tensor) -> Tensor:
    """Q at a one-hot sample that can be differentiated."""
    return critics.minimum(state, gumbel_ext.gumbel_softmax(logits, TAU, hard=True))


def score_function(critics: TwoCritics, state: Tensor, logits: Tensor) -> Tensor:
    """The log-probability of a sampled action, times by how much it beats another one."""
    draws = logits.detach().expand(2, *logits.shape)
    action, other = gumbel_ext.gumbel_argmax(draws)
    with torch.no_grad():
        values = critics.of_all_actions(state)
        of_action, of_other = values.gather(-1, torch.stack([action, other], -1)).unbind(-1)
    log_pi = F.log_softmax(logits, -1).gather(-1, action.unsqueeze(-1)).squeeze(-1)
    return (of_action - of_other) * log_pi


def expectation(critics: TwoCritics, state: Tensor, logits: Tensor) -> Tensor:
    """The sum over the actions."""
    with torch.no_grad():
        values = critics.of_all_actions(state)
    return (F.softmax(logits, -1) * values).sum(-1)


@dataclass(frozen=True)
class Method:
    """A way to improve the policy."""

    critic: type[nn.Module]
    gradient: PolicyGradient


METHODS = {
    "straight-through, action into the critic": Method(Critic, straight_through),
    "straight-through, critic linear in it": Method(LinearCritic, straight_through),
    "score function": Method(LinearCritic, score_function),
    "expectation over the actions": Method(LinearCritic, expectation),
}


@dataclass(frozen=True)
class Transitions:
    """What the steps taken so far have shown; `ended` is 1 where the pole fell."""

    state: Tensor
    action: Tensor
    reward: Tensor
    following: Tensor
    ended: Tensor

    @classmethod
    def empty(cls, size: int) -> Transitions:
        """Returns memory for `size` steps."""
        wide = (size, OBSERVATIONS)
        return cls(
            torch.zeros(wide),
            torch.zeros(size, ACTIONS),
            torch.zeros(size),
            torch.zeros(wide),
            torch.zeros(size),
        )

    def __getitem__(self, index: Tensor) -> Transitions:
        return Transitions(*(part[index] for part in vars(self).values()))


class Agent:
    """Policy, critics and their optimizers."""

    def __init__(self, method: Method) -> None:
        self.gradient = method.gradient
        self.policy = perceptron(OBSERVATIONS, HIDDEN, ACTIONS)
        self.critics = TwoCritics(method.critic)
        self.target = copy.deepcopy(self.critics).requires_grad_(False)
        self.policy_optimizer = torch.optim.Adam(
            self.policy.parameters(), lr=LEARNING_RATE, fused=True
        )
        self.critics_optimizer = torch.optim.Adam(
            self.critics.parameters(), lr=LEARNING_RATE, fused=True
        )

    @torch.no_grad()
    def act(self, observation: np.ndarray) -> int:
        """Returns an action drawn from the policy."""
        logits = self.policy(torch.from_numpy(observation))
        return int(gumbel_ext.gumbel_argmax(logits))

    def update(self, batch: Transitions) -> None:
        """Takes one step with the critics and one with the policy."""
        with torch.no_grad():
            log_pi = F.log_softmax(self.policy(batch.following), -1)
            values = self.target.of_all_actions(batch.following) - ENTROPY_WEIGHT * log_pi
            value = (log_pi.exp() * values).sum(-1)
            goal = batch.reward + DISCOUNT * (1 - batch.ended) * value
        first = F.mse_loss(self.critics.first(batch.state, batch.action), goal)
        second = F.mse_loss(self.critics.second(batch.state, batch.action), goal)
        self.critics_optimizer.zero_grad()
        (first + second).backward()
        self.critics_optimizer.step()

        logits = self.policy(batch.state)
        log_pi = F.log_softmax(logits, -1)
        entropy = -(log_pi.exp() * log_pi).sum(-1)
        # The critics' weights get a gradient here, too, which the next zero_grad discards.
        objective = self.gradient(self.critics, batch.state, logits) + ENTROPY_WEIGHT * entropy
        self.policy_optimizer.zero_grad()
        (-objective.mean()).backward()
        self.policy_optimizer.step()

        with torch.no_grad():
            for slow, weight in zip(
                self.target.parameters(), self.critics.parameters(), strict=True
            ):
                slow.lerp_(weight, TARGET_RATE)


def train(method: Method, steps: int, seed: int) -> tuple[Agent, list[float]]:
    """Returns the agent after `steps` steps of the environment, and the return of each episode."""
    torch.manual_seed(seed)
    agent = Agent(method)
    environment = gymnasium.make(ENVIRONMENT)
    seen = Transitions.empty(steps)
    returns: list[float] = []
    observation, _ = environment.reset(seed=seed)
    total = 0.0
    for step in range(steps):
        action = int(torch.randint(ACTIONS, ())) if step < RANDOM_STEPS else agent.act(observation)
        following, reward, terminated, truncated, _ = environment.step(action)
        total += float(reward)
        seen.state[step] = torch.from_numpy(observation)
        seen.action[step, action] = 1
        seen.reward[step] = float(reward)
        seen.following[step] = torch.from_numpy(following)
        # An episode that was cut off at its longest could have gone on: its value is not 0.
        seen.ended[step] = float(terminated)
        observation = following
        if terminated or truncated:
            returns.append(total)
            total = 0.0
            observation, _ = environment.reset()
        if step >= RANDOM_STEPS and step % STEPS_PER_UPDATE == 0:
            agent.update(seen[torch.randint(step + 1, (BATCH,))])
    environment.close()
    return agent, returns


def test_return(agent: Agent) -> float:
    """Returns the mean return of TEST_EPISODES episodes with the policy's sampled actions."""
    torch.manual_seed(TEST_SEED)
    environment = gymnasium.make(ENVIRONMENT)
    total = 0.0
    for episode in range(TEST_EPISODES):
        observation, _ = environment.reset(seed=TEST_SEED + episode)
        for _ in itertools.count():
            observation, reward, terminated, truncated, _ = environment.step(agent.act(observation))
            total += float(reward)
            if terminated or truncated:
                break
    environment.close()
    return total / TEST_EPISODES


def main(argv: Sequence[str] | None = None) -> None:
    """Trains with every method and seed, prints the table, writes the file."""
    arguments = parse_arguments("CartPole by actor-critic.", argv, steps=5000, seeds=5)
    results = Results(
        "actor_critic",
        [
            Column("test_return", f"return, of {LONGEST_EPISODE}", 0),
            Column("training_return", "mean return while training", 0),
        ],
        arguments.seeds,
        {
            "steps": arguments.steps,
            "threads": arguments.threads,
            "gymnasium": gymnasium.__version__,
        },
    )
    for seed in results.each_seed(arguments.out):
        for name, method in METHODS.items():
            agent, returns = train(method, arguments.steps, seed)
            results.add(
                name,
                test_return=test_return(agent),
                training_return=sum(returns) / max(1, len(returns)),
            )
    results.show()


if __name__ == "__main__":
    main()
