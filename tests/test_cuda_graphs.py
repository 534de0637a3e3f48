"""CUDA graphs: each replay draws anew, a seed repeats them, and replay N is eager call N."""

import itertools

import pytest
import torch
from device_calls import DRAWING, OF_A_STATE, REGIMES, WITHOUT_NOISE, draw_inputs
from oracle import rng_state

import gumbel_ext
from gumbel_ext.nn import GumbelVectorQuantizer

PRODUCTS = {"embedding_soft", "embedding_hard", "vector_quantizer"}
pytestmark = [pytest.mark.cuda_only, pytest.mark.gpu_only(reason="CUDA graphs")]


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


def assert_equal(actual, expected, name=None):
    """To the bit, but for products of matrices, which are not this package's."""
    for a, b in zip(actual, expected, strict=True):
        if name in PRODUCTS and a.is_floating_point():
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))


def copied(results):
    """Those of a replay are overwritten by the next."""
    return [t.clone() for t in results]


# ---- every operator -----------------------------------------------------------------------------

every_place = pytest.mark.parametrize("where", ["last", "middle"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@every_place
@every_dtype
@pytest.mark.parametrize("name", DRAWING)
def test_every_operator_draws_as_eager_calls_do(device, name, dtype, where):
    """Forward and backward: two replays differ, a reseed repeats them, and eager calls go on where
    replays left the generator.
    """
    x = draw_inputs(where, dtype).to(device)
    call = DRAWING[name]
    graph, results = captured(lambda: call(x))
    torch.manual_seed(5)
    eager = [call(x) for _ in range(4)]
    for _ in range(2):
        torch.manual_seed(5)
        replays = []
        for expected in eager[:3]:
            graph.replay()
            replays.append(copied(results))
            assert_equal(replays[-1], expected, name)
        assert_equal(call(x), eager[3], name)
    for first, second in itertools.pairwise(replays):
        assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_place
@pytest.mark.parametrize("name", DRAWING)
def test_every_operator_with_a_generator_of_its_own(device, name, where):
    x = draw_inputs(where).to(device)
    call = DRAWING[name]
    generator = torch.Generator(device).manual_seed(8)
    default = torch.cuda.get_rng_state()
    graph, results = captured(lambda: call(x, generator=generator), generator)
    generator.manual_seed(9)
    eager = [call(x, generator=generator) for _ in range(3)]
    generator.manual_seed(9)
    for expected in eager:
        graph.replay()
        assert_equal(results, expected, name)
    assert torch.equal(torch.cuda.get_rng_state(), default)


@every_place
@pytest.mark.parametrize("name", OF_A_STATE)
def test_every_operator_reads_a_state_at_each_replay(device, name, where):
    """Stepping it in place steps the noise."""
    x = draw_inputs(where).to(device)
    call = OF_A_STATE[name]
    state = rng_state(3, 4, device)
    graph, results = captured(lambda: call(x, rng_state=state))
    for step in range(3):
        graph.replay()
        assert_equal(results, call(x, rng_state=rng_state(3, 4 + 2 * step, device)), name)
        state[1] += 2


@every_place
@every_dtype
@pytest.mark.parametrize("name", [*OF_A_STATE, *WITHOUT_NOISE])
def test_every_operator_reads_new_values_at_each_replay(device, name, dtype, where):
    """Temperatures, masks and codebooks as well as logits."""
    static = draw_inputs(where, dtype).to(device)
    state = {} if name in WITHOUT_NOISE else {"rng_state": rng_state(device=device)}
    call = WITHOUT_NOISE.get(name) or OF_A_STATE[name]
    graph, results = captured(lambda: call(static, **state))
    for _ in range(3):
        x = draw_inputs(where, dtype).to(device)
        with torch.no_grad():
            static.logits.copy_(x.logits)
            static.tau.copy_(x.tau)
            static.mask.copy_(x.mask)
            static.codebook.copy_(x.codebook)
        graph.replay()
        assert_equal(results, call(x, **state), name)


def test_the_vector_quantizer(device, hard):
    layer = GumbelVectorQuantizer(8, 40, 2, 6, temperature=0.7, hard=hard).to(device)
    features = torch.randn(30, 8).to(device)
    weight = torch.randn(30, 6).to(device)

    def train():
        out = layer(features)
        loss = (out.codevectors * weight).sum() + out.prob_perplexity
        return out.codevectors.detach(), *torch.autograd.grad(loss, list(layer.parameters()))

    graph, results = captured(train)
    torch.manual_seed(4)
    eager = [train() for _ in range(3)]
    torch.manual_seed(4)
    for expected in eager:
        graph.replay()
        assert_equal(results, expected, "vector_quantizer")
    assert not torch.equal(eager[0][0], eager[1][0])


# ---- every regime of the core -------------------------------------------------------------------


def forward_calls(logits, dim, generator=None):
    """One result a public function."""
    return (
        gumbel_ext.gumbel_softmax(logits, 0.5, dim=dim, generator=generator),
        gumbel_ext.gumbel_softmax(logits, 0.5, True, dim=dim, generator=generator),
        gumbel_ext.gumbel_argmax(logits, dim, generator=generator),
        gumbel_ext.gumbel_noise(1000, device=logits.device, generator=generator),
    )


@pytest.mark.parametrize(("shape", "dim"), REGIMES.values(), ids=REGIMES)
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
@pytest.mark.parametrize(("shape", "dim"), REGIMES.values(), ids=REGIMES)
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
