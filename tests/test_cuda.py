"""What only a GPU can show: graphs, streams, devices, waiting, and every regime of the kernels."""

import functools
import itertools
import math

import pytest
import torch
from oracle import (
    DTYPES,
    assert_index_close,
    assert_one_hot,
    assert_row_errors,
    assert_rows_sum_to_one,
    assert_soft_close,
    assert_tau_gradient_close,
    condition,
    eps,
    noise,
    rng_state,
)
from scipy import stats

import gumbel_ext
from gumbel_ext import _reference

pytestmark = pytest.mark.cuda_only

ALPHA = 1e-4
INF, NAN = float("inf"), float("nan")
OPS = torch.ops.gumbel_ext


@functools.lru_cache(maxsize=4)
def noise_of(shape, device):
    """Reference noise in float64.  Large shapes are made on the GPU, and would take minutes
    elsewhere; small ones are not, so that under compute-sanitizer little else runs there.
    """
    if math.prod(shape) < 1 << 18:
        return noise(shape)
    return _reference.gumbel_noise(shape, rng_state(device=device))


# ---- every regime against the reference ---------------------------------------------------------

# What csrc/cuda/plan.cpp tells apart on a GPU of about a hundred multiprocessors: how many classes
# a team of threads holds, rows that begin inside a vector, rows that too few blocks would share.
SMALL = {
    "one_lane": ((37, 3), -1),
    "one_lane_full": ((64, 4), -1),
    "two_lanes": ((50, 8), -1),
    "two_lanes_odd": ((50, 7), -1),
    "four_lanes": ((41, 13), -1),
    "eight_lanes": ((33, 32), -1),
    "warp": ((19, 128), -1),
    "warp_odd": ((19, 127), -1),
    "warp_two_groups": ((9, 255), -1),
    "warp_most_groups": ((9, 768), -1),
    "block": ((5, 1025), -1),
    "block_256": ((3, 6144), -1),
    "block_384": ((3, 9001), -1),
    "cluster_of_two": ((3, 9301), -1),
    "split_row": ((2, 20_011), -1),
    "columns": ((3, 40, 33), 1),
    "columns_odd": ((2, 19, 7), 1),
    "columns_first": ((50, 12), 0),
    "columns_shared": ((2, 700, 5), 1),
}
LARGE = {
    "clusters_of_eight": ((70, 50_003), -1),
    "clusters_of_sixteen": ((67, 131_072), -1),
    "stream": ((67, 150_001), -1),
    "one_huge_row": ((1, 3_000_001), -1),
    "many_rows": ((300_001, 10), -1),
    "image": ((2, 512, 32, 32), 1),
    "columns_many_classes": ((2, 30_011, 9), 1),
}


def draw_inputs(shape, dim, dtype, device, unaligned=False):
    """``(logits, grad, mask, tau)``, made on the CPU and moved as they are.

    Nothing but copies writes them, so that compute-sanitizer, told to watch this package's kernels
    alone, takes none of it for memory that nobody wrote.
    """

    def moved(x):
        if not unaligned:
            return x.to(device)
        buffer = torch.cat([x.new_zeros(1), x.flatten()]).to(device)
        return buffer[1:].view(x.shape)

    logits, grad = (moved(x) for x in torch.randn(2, *shape).to(dtype))
    mask = torch.rand(shape) < 0.7
    rows = [1 if d == dim % len(shape) else n for d, n in enumerate(shape)]
    tau = 0.3 + torch.rand(rows).to(torch.float64 if dtype == torch.float64 else torch.float32)
    mask.movedim(dim, 0)[0] = True  # every row keeps a choice,
    mask.movedim(dim, -1)[(-1,) * (len(shape) - 1)] = False  # but one
    return logits, grad, mask.to(device), tau.to(device)


def expectation(logits, tau, dim, grad, mask, noise):
    """``(y, dlogits, dtau)`` of the reference, float64: made where the noise is, to the CPU."""
    where = noise.device
    leaf = logits.detach().to(where, torch.float64).requires_grad_()
    tau = torch.as_tensor(tau).detach().to(where, torch.float64).requires_grad_()
    mask = None if mask is None else mask.to(where)
    y, _ = _reference.gumbel_softmax(leaf, tau, dim=dim, mask=mask, noise=noise)
    gradients = torch.autograd.grad(y, (leaf, tau), grad.to(where, torch.float64))
    return [t.detach().cpu() for t in (y, *gradients)]


def assert_choice(index, logits, noise, dim, mask):
    """The best class that the mask allows but for near-ties; -1 where it allows none."""
    if mask is None:
        assert_index_close(index, logits, noise, dim)
        return
    mask, index = mask.cpu(), index.cpu()
    some = mask.any(dim)
    assert (index[~some] == -1).all()
    low = torch.where(mask, logits.cpu().double(), 0.0)
    scores = (low + noise).masked_fill(~mask, -INF).movedim(dim, -1)[some]
    chosen = scores.gather(-1, index[some].unsqueeze(-1)).squeeze(-1)
    size = (low.abs() + noise.abs()).movedim(dim, -1)[some].amax(-1)
    lost = scores.amax(-1) - chosen
    assert (lost <= 8 * eps(torch.promote_types(logits.dtype, torch.float32)) * size).all()
    assert int((lost > 0).sum()) <= 1 + lost.numel() // 1000


def check_against_reference(logits, grad, mask, tau, dim, state):
    """Soft, hard and index, forward and backward."""
    made = noise_of(tuple(logits.shape), logits.device)
    g = made.cpu()
    learned = isinstance(tau, torch.Tensor)
    wanted_y, wanted_logits, wanted_tau = expectation(logits, tau, dim, grad, mask, made)
    k = condition(logits, g, tau, dim)
    alone = gumbel_ext.gumbel_argmax(logits, dim, mask=mask, rng_state=state)
    assert_choice(alone, logits, g, dim, mask)
    cpu_mask = None if mask is None else mask.cpu()

    for hard in (False, True):
        leaf = logits.detach().requires_grad_()
        temperature = tau.detach().requires_grad_() if learned else tau
        y, index = gumbel_ext.gumbel_softmax(
            leaf, temperature, hard, dim=dim, mask=mask, return_index=True, rng_state=state
        )
        assert torch.equal(index, alone)
        if hard:
            one_hot = torch.zeros_like(y).scatter(dim, index.clamp(min=0).unsqueeze(dim), 1)
            assert torch.equal(y, one_hot * (index >= 0).unsqueeze(dim))
        else:
            assert_soft_close(y, wanted_y, k)
            if mask is None:
                assert_rows_sum_to_one(y, dim)

        inputs = (leaf, temperature) if learned else (leaf,)
        actual = torch.autograd.grad(y, inputs, grad)
        # Of few rows the percentile is the worst: one whose terms cancel loses a little more.
        assert_row_errors(
            actual[0], wanted_logits, logits, grad, tau, g, dim, mask=cpu_mask, slack=4.0
        )
        if mask is not None:
            assert (actual[0].cpu()[~cpu_mask] == 0).all()
        if learned:
            assert_tau_gradient_close(
                actual[1], wanted_tau, wanted_logits, logits, grad, tau, g, dim, cpu_mask
            )


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), SMALL.values(), ids=SMALL)
def test_small(device, state, shape, dim, dtype):
    logits, grad, mask, tau = draw_inputs(shape, dim, dtype, device)
    check_against_reference(logits, grad, None, 0.5, dim, state)
    check_against_reference(logits, grad, mask, tau, dim, state)


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), SMALL.values(), ids=SMALL)
def test_unaligned(device, state, shape, dim, dtype):
    """One element past an aligned address: vectors must be loaded whole or not at all."""
    logits, grad, _, _ = draw_inputs(shape, dim, dtype, device, unaligned=True)
    assert logits.data_ptr() % 16 != 0
    check_against_reference(logits, grad, None, 0.5, dim, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "dim"), LARGE.values(), ids=LARGE)
def test_large(device, state, shape, dim, dtype):
    logits, grad, mask, tau = draw_inputs(shape, dim, dtype, device)
    check_against_reference(logits, grad, None, 0.5, dim, state)
    check_against_reference(logits, grad, mask, tau, dim, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "dim"), [*LARGE.values(), *SMALL.values()], ids=[*LARGE, *SMALL])
def test_runs_give_the_same_bits(device, state, shape, dim, dtype):
    """While other blocks come and go: the order of a sum must not depend on who is first."""
    logits, grad, mask, tau = draw_inputs(shape, dim, dtype, device)
    tau.requires_grad_()
    other, disturbance = torch.cuda.Stream(), torch.randn(1 << 20, device=device)

    def results():
        out = []
        for hard in (False, True):
            leaf = logits.detach().requires_grad_()
            y, index = gumbel_ext.gumbel_softmax(
                leaf, tau, hard, dim=dim, mask=mask, return_index=True, rng_state=state
            )
            out += [y.detach(), index, *torch.autograd.grad(y, (leaf, tau), grad)]
        return [*out, gumbel_ext.gumbel_argmax(logits, dim, mask=mask, rng_state=state)]

    expected = results()
    for _ in range(4):
        with torch.cuda.stream(other):
            for _ in range(8):
                disturbance.sin_()
        for a, b in zip(results(), expected, strict=True):
            assert torch.equal(a, b)


# ---- the noise of the CPU -----------------------------------------------------------------------


def test_float64_noise_is_the_cpus(device):
    """Float64 noise tells every word apart, so equal noise means equal words."""
    for seed, offset in ((0, 0), (7, (1 << 64) - 1), ((1 << 64) - 5, 0xFFFFFFFF)):
        ours, theirs = (
            gumbel_ext.gumbel_noise(
                1_000_003, dtype=torch.float64, device=where, rng_state=rng_state(seed, offset)
            ).cpu()
            for where in (device, "cpu")
        )
        unit = eps(torch.float64) * theirs.abs().clamp(min=1)
        assert ((ours - theirs).abs() <= unit).all()
        assert (ours == theirs).double().mean() > 0.99


def test_float32_noise_is_the_cpus_to_a_few_units(device):
    ours, theirs = (
        gumbel_ext.gumbel_noise(4_000_003, device=where, rng_state=rng_state()).cpu()
        for where in (device, "cpu")
    )
    unit = eps(torch.float32) * theirs.abs().clamp(min=1)
    assert ((ours - theirs).abs() <= 8 * unit).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "dim"), [((200_000, 10), -1), ((2000, 3001), -1), ((20, 500, 100), 1)], ids=str
)
def test_indices_are_the_cpus(device, shape, dim, dtype):
    """But for near-ties, of which there is one in 10^5 rows or fewer."""
    logits = torch.randn(shape).to(dtype)
    state = rng_state()
    theirs = gumbel_ext.gumbel_argmax(logits, dim, rng_state=state)
    ours = gumbel_ext.gumbel_argmax(logits.to(device), dim, rng_state=state.to(device)).cpu()
    differ = int((ours != theirs).sum())
    assert differ <= 1 + theirs.numel() // 20_000
    if differ:
        noise = noise_of(shape, torch.device(device)).cpu()
        assert_index_close(ours, logits, noise, dim)


def test_values_and_gradients_are_the_cpus(device):
    """With one state, whatever the device: a model that moves keeps its samples."""
    logits, grad = torch.randn(2, 500, 300)
    results = []
    for where in ("cpu", device):
        leaf = logits.to(where).requires_grad_()
        for hard in (False, True):
            y = gumbel_ext.gumbel_softmax(leaf, 0.5, hard, rng_state=rng_state())
            results.append(y.detach().cpu())
            results.append(torch.autograd.grad(y, leaf, grad.to(where))[0].cpu())
    for theirs, ours in zip(results[:4], results[4:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_long_tail(device):
    """A head 20.5 above 262,143 tails loses 32.8 times in 100,000 draws, for every way to ask.

    Noise that stops at 16.7 never lets a tail win.  The number of wins is Poisson; the interval has
    alpha = ALPHA, and 0 has probability 6e-15 in truth.
    """
    classes, gap, draws, rows = 1 << 18, 20.5, 100_000, 2000
    expected = draws * (classes - 1) / (classes - 1 + math.exp(gap))
    low, high = stats.poisson.interval(1 - ALPHA, expected)
    assert low > 1

    def soft(logits, state):
        return gumbel_ext.gumbel_softmax(logits, return_index=True, rng_state=state)[1]

    def hard(logits, state):
        return gumbel_ext.gumbel_softmax(logits, hard=True, return_index=True, rng_state=state)[1]

    def index(logits, state):
        return gumbel_ext.gumbel_argmax(logits, rng_state=state)

    for number, (way, dtype) in enumerate(
        [(index, torch.float32), (index, torch.bfloat16), (hard, torch.float32), (soft, torch.half)]
    ):
        logits = torch.zeros(rows, classes, dtype=dtype, device=device)
        logits[:, 0] = gap
        winners = [way(logits, rng_state(number, 2 * i, device)) for i in range(draws // rows)]
        winners = torch.cat(winners)
        tails = winners[winners != 0].double() / classes
        assert low <= tails.numel() <= high, (way.__name__, dtype)
        assert stats.kstest(tails.cpu().numpy(), "uniform").pvalue > ALPHA


# ---- CUDA graphs --------------------------------------------------------------------------------

GRAPH_SHAPES = {
    "tiny": ((20, 10), -1),
    "rows": ((64, 1000), -1),
    "clusters": ((70, 20_000), -1),
    "split_row": ((1, 70_001), -1),
    "columns": ((3, 40, 33), 1),
}


def captured(call, generator=None):
    """``(graph, results)``; the calls before capture settle what is allocated once."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


def forward_calls(logits, dim, generator=None):
    """One result a public function."""
    return (
        gumbel_ext.gumbel_softmax(logits, 0.5, dim=dim, generator=generator),
        gumbel_ext.gumbel_softmax(logits, 0.5, True, dim=dim, generator=generator),
        gumbel_ext.gumbel_argmax(logits, dim, generator=generator),
        gumbel_ext.gumbel_noise(1000, device=logits.device, generator=generator),
    )


@pytest.mark.parametrize(("shape", "dim"), GRAPH_SHAPES.values(), ids=GRAPH_SHAPES)
def test_replay_n_is_eager_call_n(device, shape, dim):
    """Replays differ, a seed repeats them, and they are what eager calls would have drawn."""
    logits = torch.randn(shape).to(device)
    graph, results = captured(lambda: forward_calls(logits, dim))

    torch.manual_seed(5)
    eager = [forward_calls(logits, dim) for _ in range(3)]
    for _ in range(2):
        torch.manual_seed(5)
        for expected in eager:
            graph.replay()
            for a, b in zip(results, expected, strict=True):
                assert torch.equal(a, b)
    for a, b in zip(eager[0], eager[1], strict=True):
        if a.numel() > 3:  # an index of few rows may repeat
            assert not torch.equal(a, b)
    # Eager calls go on where the replays left the generator.
    after_replays = forward_calls(logits, dim)
    torch.manual_seed(5)
    *_, after_eager = (forward_calls(logits, dim) for _ in range(4))
    for a, b in zip(after_replays, after_eager, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("with_tau", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize(("shape", "dim"), GRAPH_SHAPES.values(), ids=GRAPH_SHAPES)
def test_backward_in_a_graph(device, hard, shape, dim, with_tau):
    """Each replay's backward sees the noise of that replay's forward."""
    logits, grad = torch.randn(2, *shape).to(device)
    leaf = logits.requires_grad_()
    tau = torch.tensor(0.5, device=device, requires_grad=True) if with_tau else 0.5
    inputs = (leaf, tau) if with_tau else (leaf,)

    def train():
        y = gumbel_ext.gumbel_softmax(leaf, tau, hard, dim=dim)
        return y.detach(), *torch.autograd.grad(y, inputs, grad)

    graph, results = captured(train)
    torch.manual_seed(6)
    eager = [train() for _ in range(3)]
    torch.manual_seed(6)
    for expected in eager:
        graph.replay()
        for a, b in zip(results, expected, strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(eager[0][1], eager[1][1])


def test_graph_reads_new_logits(device, hard):
    static = torch.zeros(50, 40, device=device)
    graph, (y, index) = captured(
        lambda: gumbel_ext.gumbel_softmax(static, 0.5, hard, return_index=True)
    )
    torch.manual_seed(7)
    for _ in range(3):
        logits = torch.randn(50, 40).to(device)
        static.copy_(logits)
        before = torch.cuda.get_rng_state()
        graph.replay()
        torch.cuda.set_rng_state(before)
        expected = gumbel_ext.gumbel_softmax(logits, 0.5, hard, return_index=True)
        assert torch.equal(y, expected[0])
        assert torch.equal(index, expected[1])


def test_explicit_generator_in_a_graph(device):
    logits = torch.randn(50, 40).to(device)
    generator = torch.Generator(device).manual_seed(8)
    default = torch.cuda.get_rng_state()
    graph, results = captured(lambda: forward_calls(logits, -1, generator), generator)
    generator.manual_seed(9)
    eager = [forward_calls(logits, -1, generator) for _ in range(3)]
    generator.manual_seed(9)
    for expected in eager:
        graph.replay()
        for a, b in zip(results, expected, strict=True):
            assert torch.equal(a, b)
    assert torch.equal(torch.cuda.get_rng_state(), default)


def test_rng_state_in_a_graph(device, hard):
    """A state on the device is read at every replay: stepping it in place steps the noise."""
    logits, grad = torch.randn(2, 50, 40).to(device)
    leaf = logits.requires_grad_()
    state = rng_state(3, 4, device)

    def train(state):
        y = gumbel_ext.gumbel_softmax(leaf, 0.5, hard, rng_state=state)
        return y.detach(), *torch.autograd.grad(y, leaf, grad)

    graph, results = captured(lambda: train(state))
    for step in range(3):
        graph.replay()
        for a, b in zip(results, train(rng_state(3, 4 + 2 * step, device)), strict=True):
            assert torch.equal(a, b)
        state[1] += 2


def test_compiled_with_graphs(device, hard):
    """torch.compile's own CUDA graphs: fresh noise at each call, right gradients."""
    torch.compiler.reset()
    base, grad = torch.randn(2, 64, 30).to(device)

    @torch.compile(fullgraph=True, mode="reduce-overhead")
    def sample(logits):
        return gumbel_ext.gumbel_softmax(logits * 2, 0.5, hard)

    seen = []
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        leaf = base.clone().requires_grad_()
        y = sample(leaf)
        (gradient,) = torch.autograd.grad(y, leaf, grad)
        seen.append((y.detach().clone(), gradient.clone()))
    torch.compiler.reset()
    for (a, slope_a), (b, slope_b) in itertools.pairwise(seen):
        assert not torch.equal(a, b)
        assert not torch.equal(slope_a, slope_b)
    if not hard:
        # d/dl of softmax((2 l + g) / tau), written with the sample itself.
        for y, gradient in seen:
            expected = 2 * y * (grad - (y * grad).sum(-1, keepdim=True)) / 0.5
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)


# ---- streams, devices, waiting ------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "dim"), GRAPH_SHAPES.values(), ids=GRAPH_SHAPES)
def test_current_stream(device, state, hard, shape, dim):
    """The logits arrive late on a stream of their own: a kernel on another would read zeros."""
    values, grad = torch.randn(2, *shape).to(device)

    def train(leaf):
        y, index = gumbel_ext.gumbel_softmax(
            leaf, 0.5, hard, dim=dim, return_index=True, rng_state=state
        )
        alone = gumbel_ext.gumbel_argmax(leaf.detach(), dim, rng_state=state)
        return y.detach(), index, alone, *torch.autograd.grad(y, leaf, grad)

    expected = train(values.clone().requires_grad_())
    logits = torch.zeros_like(values)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # about 50 ms
        logits.copy_(values)
        actual = train(logits.requires_grad_())
    stream.synchronize()
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def test_streams_do_not_share_scratch(device):
    """Rows that are split among blocks leave partial results: those of two calls at a time, too."""
    batches = torch.randn(4, 2, 200_003).to(device)
    states = [rng_state(i, 0, device) for i in range(4)]

    def run(i):
        soft, index = gumbel_ext.gumbel_softmax(
            batches[i], 0.5, return_index=True, rng_state=states[i]
        )
        hard = gumbel_ext.gumbel_softmax(batches[i], 0.5, True, rng_state=states[i])
        return soft, index, hard

    expected = [run(i) for i in range(4)]
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    for _ in range(20):
        actual = []
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                actual.append(run(i))
        torch.cuda.synchronize()
        for mine, theirs in zip(actual, expected, strict=True):
            for a, b in zip(mine, theirs, strict=True):
                assert torch.equal(a, b)


def test_another_device_than_the_current_one(hard):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    logits, grad = torch.randn(2, 30, 50)
    results = []
    for where in ("cuda:0", "cuda:1"):
        generator = torch.Generator(where).manual_seed(4)
        with torch.cuda.device(0):
            leaf = logits.to(where).requires_grad_()
            y, index = gumbel_ext.gumbel_softmax(
                leaf, 0.5, hard, return_index=True, generator=generator
            )
            (gradient,) = torch.autograd.grad(y, leaf, grad.to(where))
            noise = gumbel_ext.gumbel_noise(10, device=where, generator=generator)
            assert torch.cuda.current_device() == 0
        for t in (y, index, gradient, noise):
            assert t.device == torch.device(where)
        results.append([t.detach().cpu() for t in (y, index, gradient, noise)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="mask"):
        gumbel_ext.gumbel_softmax(
            logits.to("cuda:1"), mask=torch.ones(50, dtype=torch.bool, device="cuda:0")
        )


@pytest.fixture
def no_waiting():
    """Whatever makes the host wait for the GPU raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("shape", "dim"), GRAPH_SHAPES.values(), ids=GRAPH_SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_host_never_waits(device, request, hard, shape, dim, dtype):
    logits, _, mask, tau = draw_inputs(shape, dim, dtype, device)
    temperatures = [0.5, tau, tau.double(), tau.mean()]
    state, state_on_host = rng_state(device=device), rng_state()
    generator = torch.Generator(device).manual_seed(1)
    request.getfixturevalue("no_waiting")
    for temperature in temperatures:
        if isinstance(temperature, torch.Tensor):
            temperature = temperature.detach().requires_grad_()
        for options in (
            {},
            {"mask": mask},
            {"mask": mask.expand(shape), "rng_state": state},
            {"rng_state": state_on_host},
            {"generator": generator},
        ):
            for laid in (logits, logits.mT.contiguous().mT, logits[..., ::2].mT):
                leaf = laid.detach().requires_grad_()
                fitting = dict(options)
                given = temperature
                if laid.shape != logits.shape:
                    fitting.pop("mask", None)
                    given = 0.5
                y = gumbel_ext.gumbel_softmax(leaf, given, hard, dim=dim, **fitting)
                inputs = [t for t in (leaf, given) if isinstance(t, torch.Tensor)]
                torch.autograd.grad(y, inputs, torch.ones_like(y))
                gumbel_ext.gumbel_argmax(laid, dim, **fitting)
    gumbel_ext.gumbel_noise(100, device=device, generator=generator)


def test_what_waits_is_seen(device, no_waiting):
    """That the mode of the test before sees a wait at all."""
    with pytest.raises(RuntimeError, match="synchron"):
        torch.ones(3, device=device).sum().item()


# ---- generators and states ----------------------------------------------------------------------


def test_generators_seed_is_the_state(device):
    """CUDA generators are Philox themselves: seed and offset are the noise contract's."""
    generator = torch.Generator(device).manual_seed(1234)
    for call in range(3):
        noise = gumbel_ext.gumbel_noise(
            1000, dtype=torch.float64, device=device, generator=generator
        )
        state = torch.tensor([1234, 2 * call], device=device)
        again = gumbel_ext.gumbel_noise(1000, dtype=torch.float64, device=device, rng_state=state)
        assert torch.equal(noise, again)
    used = OPS.gumbel_softmax(
        torch.zeros(3, 4, device=device), 1.0, None, False, -1, None, False, generator, None
    )[2]
    assert used.tolist() == [1234, 6]


def test_rng_state_may_lie_on_the_cpu(device, hard):
    logits, grad = torch.randn(2, 30, 40).to(device)
    leaf = logits.requires_grad_()
    results = []
    for state in (rng_state(), rng_state(device=device)):
        y = gumbel_ext.gumbel_softmax(leaf, 0.5, hard, rng_state=state)
        results.append((y.detach(), torch.autograd.grad(y, leaf, grad)[0]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# ---- what cannot raise, and what does -----------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tau_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(7, 5), (7, 40), (7, 2100), (7, 10_001), (7, 20_000)], ids=str)
def test_bad_temperature_in_a_tensor_is_a_nan_row(device, state, shape, dtype, tau_dtype):
    """To raise would be to wait for the GPU.  Other rows are untouched, the index too."""
    logits, grad = torch.randn(2, *shape).to(device, dtype)
    good = torch.full((shape[0], 1), 0.5, dtype=tau_dtype, device=device)
    bad = good.clone()
    for row, value in enumerate((0.0, -1.0, NAN, INF, -INF), start=1):
        bad[row] = value
    results = []
    for tau in (good, bad):
        leaf = logits.detach().requires_grad_()
        y, index = gumbel_ext.gumbel_softmax(leaf, tau, return_index=True, rng_state=state)
        results.append((y.detach(), index, torch.autograd.grad(y, leaf, grad)[0]))
    (y, index, gradient), (bad_y, bad_index, bad_gradient) = results
    assert bad_y[1:6].isnan().all()
    assert bad_gradient[1:6].isnan().all()
    assert torch.equal(bad_index, index)
    for row in (0, 6):
        assert torch.equal(bad_y[row], y[row])
        assert torch.equal(bad_gradient[row], gradient[row])


@pytest.mark.parametrize("tau", [0.0, -1.5, NAN, INF], ids=str)
def test_bad_temperature_on_the_cpu_raises(device, tau):
    """A number in a CPU tensor can be read at no cost."""
    with pytest.raises(ValueError, match="tau"):
        gumbel_ext.gumbel_softmax(torch.zeros(3, 4, device=device), torch.tensor(tau))


def test_temperature_may_be_a_number_on_the_cpu(device, state):
    logits = torch.randn(30, 40).to(device)
    tau = torch.tensor(0.5, requires_grad=True)
    y = gumbel_ext.gumbel_softmax(logits, tau, rng_state=state)
    assert torch.equal(y.detach(), gumbel_ext.gumbel_softmax(logits, 0.5, rng_state=state))
    weight = torch.randn(30, 40).to(device)
    (gradient,) = torch.autograd.grad(y, tau, weight)
    on_device = torch.tensor(0.5, device=device, requires_grad=True)
    y = gumbel_ext.gumbel_softmax(logits, on_device, rng_state=state)
    assert gradient.device.type == "cpu"
    torch.testing.assert_close(gradient, torch.autograd.grad(y, on_device, weight)[0].cpu())


def test_devices_may_not_be_mixed(device):
    logits = torch.zeros(3, 4)
    for argument, other in (
        ("mask", torch.ones(3, 4, dtype=torch.bool)),
        ("tau", torch.ones(3, 1)),
    ):
        with pytest.raises(ValueError, match=argument):
            gumbel_ext.gumbel_softmax(logits.to(device), **{argument: other})
        with pytest.raises(ValueError, match=argument):
            gumbel_ext.gumbel_softmax(logits, **{argument: other.to(device)})
    with pytest.raises(ValueError, match="rng_state"):
        gumbel_ext.gumbel_softmax(logits, rng_state=rng_state(device=device))
    with pytest.raises(ValueError, match="generator"):
        gumbel_ext.gumbel_softmax(logits.to(device), generator=torch.Generator())
    with pytest.raises(ValueError, match="generator"):
        gumbel_ext.gumbel_softmax(logits, generator=torch.Generator(device))


def test_a_row_may_not_be_longer_than_an_index_within_it(device):
    logits = torch.zeros((), dtype=torch.float16, device=device).expand(1 << 31)
    with pytest.raises(ValueError, match="classes"):
        gumbel_ext.gumbel_argmax(logits)


# ---- memory -------------------------------------------------------------------------------------


def requested_bytes(when):
    """What was asked of the allocator; the blocks that it hands out may be a megabyte larger."""
    torch.cuda.synchronize()
    return torch.cuda.memory_stats()[f"requested_bytes.all.{when}"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ((4096, 256), -1),
        ((512, 2048), -1),
        ((80, 20_000), -1),
        ((70, 60_000), -1),
        ((2, 500_000), -1),
        ((4, 512, 512), 1),
    ],
    ids=str,
)
def test_peak_memory_is_output_and_gradient(device, state, hard, shape, dim, dtype):
    """And O(rows): the hard backward makes its soft sample where the gradient will be."""
    logits, grad = torch.randn(2, *shape).to(device, dtype)
    leaf = logits.requires_grad_()

    def train():
        y = gumbel_ext.gumbel_softmax(leaf, 0.5, hard, dim=dim, rng_state=state)
        return y, torch.autograd.grad(y, leaf, grad)

    train()
    before = requested_bytes("current")
    torch.cuda.reset_peak_memory_stats()
    result = train()
    peak = requested_bytes("peak") - before
    size = logits.numel() * dtype.itemsize
    rows = logits.numel() // shape[dim]
    assert peak >= 2 * size
    assert peak <= 2 * size + 16 * rows + (64 << 10)
    del result


def test_index_alone_stores_nothing_of_the_size_of_the_logits(device, state):
    logits = torch.randn(4096, 1024).to(device)
    gumbel_ext.gumbel_argmax(logits, rng_state=state)
    before = requested_bytes("current")
    torch.cuda.reset_peak_memory_stats()
    index = gumbel_ext.gumbel_argmax(logits, rng_state=state)
    peak = requested_bytes("peak") - before
    assert 8 * index.numel() <= peak <= 8 * index.numel() + (16 << 10)


@pytest.mark.slow
def test_positions_past_the_low_counter_word(device):
    """Position 2^34 is block 2^32, where the third counter word carries into the fourth."""
    classes, rows = 1 << 20, (1 << 14) + 4  # 34 GB
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of free memory on the GPU")
    logits = torch.zeros((), dtype=torch.bfloat16, device=device).expand(rows, classes)
    index = gumbel_ext.gumbel_argmax(logits, rng_state=rng_state(device=device))
    for row in (0, (1 << 14) - 1, 1 << 14, rows - 1):
        noise = _reference.gumbel_noise([classes], rng_state(device=device), [row * classes, 1])
        assert_index_close(index[row].view(1), logits[:1], noise.cpu().view(1, -1))


def test_one_hot_is_exact(device, state):
    """Largest and smallest numbers of each dtype around the one that is chosen."""
    for dtype in DTYPES:
        logits = torch.randn(64, 100).to(device, dtype)
        logits[:, 7] = torch.finfo(dtype).max
        logits[:, 8] = torch.finfo(dtype).min
        y, index = gumbel_ext.gumbel_softmax(logits, 1e-3, True, return_index=True, rng_state=state)
        assert (index == 7).all()
        assert_one_hot(y, index)
