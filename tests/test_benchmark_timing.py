"""The loop that times contenders: interleaved, on successive inputs, ratios inside a round."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.cpu_only(reason="the host's clock")


@pytest.fixture
def timing(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import timing

    return timing


WARM_UP = 4  # calls of each contender before its clock counts


class Machine:
    """A clock that calls move on; after the warm-up ever more slowly, by a tenth a call."""

    def __init__(self, contenders):
        self.now, self.calls, self.warm = 0.0, [], WARM_UP * contenders

    def contender(self, name, seconds):
        def call(i):
            self.calls.append((name, i))
            self.now += seconds * (1 + max(0, len(self.calls) - self.warm) / 10)

        return call

    def clock(self):
        return self.now


def measured(timing, rounds, **seconds):
    """Measurements, and the calls that they are of."""
    machine = Machine(len(seconds))
    race = {name: machine.contender(name, each) for name, each in seconds.items()}
    budget = timing.Budget(0.0, rounds, rounds)
    found = timing.measure(race, 3, budget, timing.HostClock(machine.clock))
    return found, machine.calls[machine.warm :]


def test_every_contender_is_timed_in_every_round_and_a_drift_cancels(timing):
    found, calls = measured(timing, 40, ours=1.0, theirs=1.5)
    assert [len(m.rounds) for m in found.values()] == [40, 40]
    assert [m.calls for m in found.values()] == [40, 40]
    in_rounds = [tuple(name for name, _ in calls[i : i + 2]) for i in range(0, 80, 2)]
    assert set(in_rounds) == {("ours", "theirs"), ("theirs", "ours")}
    ours = found["ours"].rounds
    assert max(ours) > 3 * min(ours)
    ratio = found["theirs"].relative_to(found["ours"])
    assert ratio.median == pytest.approx(1.5, rel=0.02)


def test_successive_calls_take_successive_inputs(timing):
    _, calls = measured(timing, 10, ours=1.0, theirs=1.5)
    inputs = [i for _, i in calls]
    assert inputs == [i % 3 for i in range(20)]


def test_a_cheap_contender_has_several_blocks_and_short_calls_fill_one(timing):
    found, _ = measured(timing, 5, slow=4.0, cheap=1.0, short=1e-5)
    assert found["slow"].calls == 5
    assert found["cheap"].calls == 5 * 4
    blocks = timing.MAX_BLOCKS_PER_ROUND
    assert found["short"].calls % (5 * blocks) == 0
    assert found["short"].calls > 5 * blocks
