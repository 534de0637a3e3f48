"""Threads and processes that share a generator, or only the library."""

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracle import rng_state

import gumbel_ext

THREADS, CALLS = 8, 50


def in_threads(work):
    """Results of ``work(number)`` in many threads that start together."""
    start = threading.Barrier(THREADS)

    def run(number):
        start.wait()
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return [*pool.map(run, range(THREADS))]


def used_states(device, generator=None):
    def work(_):
        logits = torch.zeros(3, 5, device=device)
        return [
            torch.ops.gumbel_ext.gumbel_softmax(
                logits, 1.0, None, False, -1, None, False, generator, None
            )[2].cpu()
            for _ in range(CALLS)
        ]

    return [state for states in in_threads(work) for state in states]


@pytest.mark.parametrize("shared", ["default", "explicit"])
def test_threads_draw_distinct_noise_and_nothing_is_lost(device, shared):
    """As many draws as calls, none twice: the generator's mutex is held while drawing."""
    explicit = torch.Generator(device).manual_seed(4)
    if shared == "default":
        torch.manual_seed(4)
    states = used_states(device, explicit if shared == "explicit" else None)
    seen = {tuple(state.tolist()) for state in states}
    assert len(seen) == THREADS * CALLS

    # The same draws in one thread: threads only change who gets which.
    alone = torch.Generator(device).manual_seed(4)
    logits = torch.zeros(3, 5, device=device)
    expected = {
        tuple(
            torch.ops.gumbel_ext.gumbel_softmax(
                logits, 1.0, None, False, -1, None, False, alone, None
            )[2].tolist()
        )
        for _ in range(THREADS * CALLS)
    }
    assert seen == expected
    if shared == "explicit":
        assert torch.equal(explicit.get_state(), alone.get_state())


@pytest.mark.parametrize("shape", [(64, 10), (4, 5000), (1, 100_000), (3, 200, 9)], ids=str)
def test_threads_compute_what_one_thread_computes(device, shape):
    """Scratch memory is not shared: every regime, forward and backward, all at once."""
    logits, grad = torch.randn(2, *shape, device=device)
    dim = 1

    def work(number):
        state = rng_state(number, 0, device)
        results = []
        for hard in (False, True):
            leaf = logits.clone().requires_grad_()
            y = gumbel_ext.gumbel_softmax(leaf, 0.5, hard, dim=dim, rng_state=state)
            results += [y.detach(), torch.autograd.grad(y, leaf, grad)[0]]
        return [*results, gumbel_ext.gumbel_argmax(logits, dim, rng_state=state)]

    for number, results in enumerate(in_threads(lambda n: [work(n) for _ in range(3)])):
        expected = work(number)
        for repeated in results:
            for a, b in zip(repeated, expected, strict=True):
                assert torch.equal(a, b)


@pytest.mark.cpu_only(reason="the choice of an instruction set")
def test_first_use_in_many_threads():
    """The instruction set is chosen once, whoever comes first: in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        assert pool.apply(first_use)


def first_use():
    expected = in_threads(lambda _: gumbel_ext.gumbel_noise(100, rng_state=rng_state()))
    return all(torch.equal(noise, expected[0]) for noise in expected)


def draw_in_child(queue):
    # A forked process has none of its parent's OpenMP threads: PyTorch's own workers do this, too.
    torch.set_num_threads(1)
    torch.set_grad_enabled(True)
    leaf = torch.zeros(50, 1000, requires_grad=True)
    y = gumbel_ext.gumbel_softmax(leaf, 0.5, True)
    (y * torch.arange(1000)).sum().backward()
    queue.put((y.detach().numpy(), leaf.grad.numpy()))


@pytest.mark.cpu_only(reason="CUDA cannot be used in a forked process")
def test_fork():
    """After parallel work in the parent, a forked child draws, and draws what its state says."""
    context = multiprocessing.get_context("fork")
    gumbel_ext.gumbel_softmax(torch.randn(2000, 1000))
    torch.manual_seed(8)
    queue = context.Queue()
    child = context.Process(target=draw_in_child, args=(queue,))
    child.start()
    y, gradient = queue.get(timeout=60)
    child.join(60)
    assert child.exitcode == 0

    torch.manual_seed(8)
    leaf = torch.zeros(50, 1000, requires_grad=True)
    expected = gumbel_ext.gumbel_softmax(leaf, 0.5, True)
    (expected * torch.arange(1000)).sum().backward()
    assert torch.equal(torch.from_numpy(y), expected.detach())
    assert torch.equal(torch.from_numpy(gradient), leaf.grad)


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, item):
        return gumbel_ext.gumbel_noise(20)


@pytest.mark.cpu_only(reason="CUDA cannot be used in a forked process")
def test_data_loader_workers():
    """PyTorch seeds each worker: no two samples are alike, and a seed repeats them all."""

    def epoch():
        generator = torch.Generator().manual_seed(2)
        loader = torch.utils.data.DataLoader(Samples(), num_workers=2, generator=generator)
        return torch.cat([*loader])

    first = epoch()
    assert len({tuple(row.tolist()) for row in first}) == 8
    assert torch.equal(epoch(), first)
