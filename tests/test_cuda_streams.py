"""The current stream, the device of the arguments, and a host that never waits."""

import pytest
import torch
from device_calls import DRAWING, OF_A_STATE, REGIMES, WITHOUT_NOISE, draw_inputs
from oracle import DTYPES, rng_state, row_shape

import gumbel_ext
from gumbel_ext import distributions

pytestmark = [pytest.mark.cuda_only, pytest.mark.gpu_only(reason="streams and waiting")]

every_shape = pytest.mark.parametrize(("shape", "dim"), REGIMES.values(), ids=REGIMES)
every_place = pytest.mark.parametrize("where", ["last", "middle"])
every_call = pytest.mark.parametrize("name", [*OF_A_STATE, *WITHOUT_NOISE])


def called(name, x, state):
    if name in WITHOUT_NOISE:
        return WITHOUT_NOISE[name](x)
    return OF_A_STATE[name](x, rng_state=state)


# ---- streams ------------------------------------------------------------------------------------


@every_place
@every_call
def test_every_operator_runs_on_the_current_stream(device, state, name, where):
    """The logits arrive late on a stream of their own: a kernel on another would read zeros."""
    values = draw_inputs(where)
    expected = called(name, values.to(device), state)
    late = draw_inputs(where).to(device)
    pinned = values.logits.pin_memory()
    x = values.to(device)
    with torch.no_grad():
        late.logits.zero_()
        late.tau.copy_(x.tau)
        late.mask.copy_(x.mask)
        late.codebook.copy_(x.codebook)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # about 10 ms
        with torch.no_grad():
            late.logits.copy_(pinned, non_blocking=True)
        actual = called(name, late, state)
    stream.synchronize()
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@every_shape
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


# ---- devices ------------------------------------------------------------------------------------


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


@every_call
def test_every_operator_runs_on_the_device_of_its_arguments(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    values = draw_inputs()
    with torch.cuda.device(0):
        ours, theirs = (
            called(name, values.to(where), rng_state(device=where))
            for where in ("cuda:1", "cuda:0")
        )
        assert torch.cuda.current_device() == 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.device == torch.device("cuda:1")
        torch.testing.assert_close(a.cpu(), b.cpu(), equal_nan=True)


# ---- waiting ------------------------------------------------------------------------------------


@pytest.fixture
def no_waiting():
    """Whatever makes the host wait for the GPU raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@every_place
@every_call
def test_no_operator_waits(device, request, name, where):
    x = draw_inputs(where).to(device)
    states = [rng_state(device=device), rng_state()]
    if name == "noise_at":
        states.pop()  # its state lies beside the positions
    generator = torch.Generator(device).manual_seed(1)
    request.getfixturevalue("no_waiting")
    for state in states:
        called(name, x, state)
    if name in DRAWING:
        DRAWING[name](x)
        DRAWING[name](x, generator=generator)


@pytest.mark.parametrize(
    "distribution",
    [
        distributions.GumbelSoftmax,
        distributions.ExpGumbelSoftmax,
        distributions.BinaryConcrete,
        distributions.LogitBinaryConcrete,
        distributions.StraightThroughGumbelSoftmax,
        distributions.StraightThroughBinaryConcrete,
    ],
)
def test_host_never_waits_for_a_distribution(device, request, distribution):
    """In a step of training: a sample, its log density, the backward of both."""
    tau = torch.tensor(0.7, device=device)
    leaf = torch.randn(30, 10).to(device).requires_grad_()
    request.getfixturevalue("no_waiting")
    q = distribution(tau, logits=leaf, validate_args=False)
    z = q.rsample()
    (z.sum() + q.log_prob(z).sum()).backward()


@pytest.mark.parametrize(("shape", "dim"), REGIMES.values(), ids=REGIMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_host_never_waits(device, request, hard, shape, dim, dtype):
    rows = row_shape(shape, dim)
    logits, mask = torch.randn(shape).to(device, dtype), (torch.rand(shape) < 0.7).to(device)
    tau = (0.3 + torch.rand(rows)).to(device)
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
