"""vmap: one call on the batch, bit for bit what the examples, or the whole batch, give alone."""

import itertools

import pytest
import torch
from oracle import eps, rng_state, runs_cpu_kernels
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, jacrev, vmap

import gumbel_ext
from gumbel_ext import _reference

BATCH, SHAPE = 4, (3, 5)
OPS = torch.ops.gumbel_ext
ALL_OPS = ("gumbel_softmax", "gumbel_argmax", "gumbel_noise")


def sampler(hard, state=None, tau=0.7):
    def sample(logits, tau=tau, mask=None, state=state):
        return gumbel_ext.gumbel_softmax(
            logits, tau, hard, mask=mask, return_index=True, rng_state=state
        )

    return sample


@pytest.fixture
def batch(device):
    """Logits, tau and a mask with a row that allows nothing, for a batch of examples."""
    logits = torch.randn(BATCH, *SHAPE, device=device)
    tau = 0.5 + torch.rand(BATCH, SHAPE[0], 1, device=device)
    mask = torch.rand(BATCH, *SHAPE, device=device) < 0.6
    mask[0, 0] = False
    return logits, tau, mask


@pytest.fixture
def no_loops():
    """An op without a rule for vmap raises, where PyTorch would loop over the examples."""
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)


def states(device, count=BATCH):
    return torch.randint(-(2**62), 2**62, (count, 2)).to(device)


def one_by_one(f, *batched):
    """The examples alone, stacked."""
    results = [f(*example) for example in zip(*batched, strict=True)]
    if isinstance(results[0], tuple):
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return (torch.stack(results),)


def seeded(f, *args, seed=5):
    torch.manual_seed(seed)
    return f(*args)


def assert_same(actual, expected):
    actual = actual if isinstance(actual, tuple) else (actual,)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        if runs_cpu_kernels(a.device) or not a.is_floating_point():
            assert torch.equal(a, b)
        else:
            # A CUDA kernel is chosen by the layout, and with it the order in which a row adds up.
            few = 32 * eps(a.dtype)
            size = float(b.abs().max()) if b.numel() else 0.0
            torch.testing.assert_close(a, b, rtol=few, atol=few * size)


# ---- randomness ---------------------------------------------------------------------------------


@pytest.mark.feature("vmap randomness=error", ops=ALL_OPS, modes=("eager",))
@pytest.mark.parametrize("name", ALL_OPS)
def test_error_mode_forbids_drawing(device, name):
    """As torch's own random functions do, also where nothing that the op is given is batched."""
    fixed = torch.randn(SHAPE, device=device)
    generator = torch.Generator(device)
    calls = {
        "gumbel_softmax": [
            gumbel_ext.gumbel_softmax,
            lambda x: gumbel_ext.gumbel_softmax(fixed),
            lambda x: gumbel_ext.gumbel_softmax(x, generator=generator),
            lambda x: OPS.gumbel_softmax(x, 1.0, None, True, 0, None, False, None, None),
            lambda x: grad(lambda z: gumbel_ext.gumbel_softmax(z).square().sum())(x),
        ],
        "gumbel_argmax": [
            gumbel_ext.gumbel_argmax,
            lambda x: gumbel_ext.gumbel_argmax(fixed),
            lambda x: OPS.gumbel_argmax(x, 0, False, None, None, None),
        ],
        "gumbel_noise": [
            lambda x: gumbel_ext.gumbel_noise((3,), device=device),
            lambda x: OPS.gumbel_noise(x, [3], None, None),
        ],
    }
    message = f"{name}: vmap: called random operation while in randomness error mode"
    for call in calls[name]:
        with pytest.raises(RuntimeError, match=message):
            vmap(call)(torch.randn_like(fixed[None]))
        with pytest.raises(RuntimeError, match=message):
            vmap(vmap(call), randomness="different")(fixed[None])
    with pytest.raises(RuntimeError, match="called random operation while in randomness error"):
        vmap(torch.rand_like)(fixed)


@pytest.mark.feature("vmap randomness=same", ops=("gumbel_softmax",), modes=("eager",))
def test_same(batch, hard):
    """Every example sees the noise of the single call; one seed is drawn."""
    sample = sampler(hard)
    actual = seeded(vmap(sample, randomness="same"), *batch)
    after = torch.rand(1)
    assert_same(actual, one_by_one(lambda *example: seeded(sample, *example), *batch))
    seeded(sample, batch[0][0])
    assert torch.equal(torch.rand(1), after)


@pytest.mark.feature("vmap randomness=different", ops=("gumbel_softmax",), modes=("eager",))
def test_different(batch, hard):
    """The noise of one call on the whole batch."""
    sample = sampler(hard)
    actual = seeded(vmap(sample, randomness="different"), *batch)
    assert_same(actual, seeded(sample, *batch))
    zeros = torch.zeros_like(batch[0][0])
    _, index = vmap(lambda _: sample(zeros.expand(50, *SHAPE)), randomness="different")(batch[0])
    assert not torch.equal(index[0], index[1])


@pytest.mark.parametrize("outer", ["same", "different"])
@pytest.mark.parametrize("inner", ["same", "different"])
@pytest.mark.feature("vmap, nested", ops=("gumbel_softmax",), modes=("eager",))
def test_nested(device, hard, inner, outer):
    """A level with "same" repeats the noise along its dimension."""
    logits = torch.randn(4, 3, 2, 5, dtype=torch.float64, device=device)
    sample = sampler(hard)
    y, index = seeded(vmap(vmap(sample, randomness=inner), randomness=outer), logits)
    distinct = (4 if outer == "different" else 1, 3 if inner == "different" else 1, 2, 5)
    noise = seeded(lambda: gumbel_ext.gumbel_noise(distinct, dtype=logits.dtype, device=device))
    noise = noise.expand(logits.shape)
    expected, expected_index = _reference.gumbel_softmax(logits, 0.7, hard, noise=noise)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=0)
    assert torch.equal(index, expected_index)
    if inner == outer == "different":
        assert_same((y, index), seeded(sample, logits))


@pytest.mark.parametrize("randomness", ["error", "same", "different"])
@pytest.mark.feature("vmap with rng_state", ops=("gumbel_softmax",), modes=("eager",))
def test_state_is_deterministic(batch, state, hard, randomness):
    """What each example alone gives with that state, in every mode."""
    sample = sampler(hard, state)
    actual = vmap(sample, randomness=randomness)(*batch)
    assert_same(actual, one_by_one(sample, *batch))
    chunked = vmap(sample, randomness=randomness, chunk_size=3)(*batch)
    assert_same(chunked, actual)


@pytest.mark.feature("vmap over rng_state", ops=("gumbel_softmax",), modes=("eager",))
def test_a_state_for_each_example(batch, device, hard):
    sample = sampler(hard)
    args = (*batch, states(device))
    assert_same(vmap(sample)(*args), one_by_one(sample, *args))
    fixed = batch[0][0]
    own = states(device)
    assert_same(
        vmap(lambda s: sample(fixed, state=s))(own),
        one_by_one(lambda s: sample(fixed, state=s), own),
    )


@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.feature(
    "vmap randomness=same", ops=("gumbel_argmax", "gumbel_noise"), modes=("eager",)
)
@pytest.mark.feature(
    "vmap randomness=different", ops=("gumbel_argmax", "gumbel_noise"), modes=("eager",)
)
def test_index_and_noise(batch, device, randomness):
    logits, _, mask = batch

    def index_of(x, m, dim=0):
        return gumbel_ext.gumbel_argmax(x, dim, keepdim=True, mask=m)

    def noise(_, size=(3, 2)):
        return gumbel_ext.gumbel_noise(size, device=device)

    index, drawn = (
        seeded(vmap(f, randomness=randomness), *args)
        for f, args in ((index_of, (logits, mask)), (noise, (logits,)))
    )
    if randomness == "different":
        assert_same(index, seeded(index_of, logits, mask, 1))
        assert_same(drawn, seeded(noise, None, (BATCH, 3, 2)))
        scalars = seeded(vmap(lambda x: noise(x, ()), randomness="different"), logits)
        assert_same(scalars, seeded(noise, None, (BATCH,)))
    else:
        assert_same(index, one_by_one(lambda *example: seeded(index_of, *example), logits, mask))
        assert_same(drawn, seeded(noise, None).expand(BATCH, 3, 2))


@pytest.mark.feature("vmap with rng_state", ops=("gumbel_argmax", "gumbel_noise"), modes=("eager",))
@pytest.mark.feature("vmap over rng_state", ops=("gumbel_argmax", "gumbel_noise"), modes=("eager",))
def test_index_and_noise_with_states(batch, state, device):
    logits, _, mask = batch
    own = states(device)

    def index_of(x, m, s=state):
        return gumbel_ext.gumbel_argmax(x, 0, mask=m, rng_state=s)

    def noise(s):
        return gumbel_ext.gumbel_noise((3, 2), device=device, rng_state=s)

    assert_same(vmap(index_of)(logits, mask), one_by_one(index_of, logits, mask))
    assert_same(vmap(index_of)(logits, mask, own), one_by_one(index_of, logits, mask, own))
    assert_same(vmap(noise)(own), one_by_one(noise, own))
    assert_same(vmap(lambda x: noise(state))(logits), noise(state).expand(BATCH, 3, 2))


PLACES = [dims for dims in itertools.product((None, 0, -1), repeat=3) if dims != (None,) * 3]

# ---- what is batched, and where -----------------------------------------------------------------


@pytest.mark.parametrize("dims", PLACES, ids=str)
@pytest.mark.feature("vmap in_dims, out_dims", ops=("gumbel_softmax",), modes=("eager",))
def test_in_dims(batch, state, hard, dims):
    """Logits, tau and mask each batched anywhere or not at all."""
    sample = sampler(hard, state)
    placed = [
        x[1] if dim is None else x.movedim(0, dim) for x, dim in zip(batch, dims, strict=True)
    ]
    alone = [x[1:2].expand_as(x) if dim is None else x for x, dim in zip(batch, dims, strict=True)]
    expected = one_by_one(sample, *alone)
    assert_same(vmap(sample, dims)(*placed), expected)
    y, index = vmap(sample, dims, out_dims=(-1, 1))(*placed)
    assert_same((y.movedim(-1, 0), index.movedim(1, 0)), expected)
    # Drawing for each example makes a batch of what none of the arguments has.
    drawing = sampler(hard)
    drawn = seeded(vmap(drawing, dims, randomness="different"), *placed)
    assert_same(drawn, seeded(drawing, *alone))


def test_fewer_dimensions_than_logits(batch, state, hard):
    """A batched tau or mask keeps its place from the right, not that of the batch's dimension."""
    logits = batch[0]
    tau = 0.5 + torch.rand(BATCH, device=logits.device)
    mask = torch.rand(BATCH, SHAPE[1], device=logits.device) < 0.8
    sample = sampler(hard, state)
    for args in ((logits, tau), (logits, tau, mask), (logits, batch[1], mask)):
        assert_same(vmap(sample)(*args), one_by_one(sample, *args))


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
def test_every_dim_of_classes(device, state, hard, dim):
    logits = torch.randn(4, 3, 5, 2, device=device)

    def sample(x):
        y = gumbel_ext.gumbel_softmax(x, 0.7, hard, dim=dim, rng_state=state)
        return y, gumbel_ext.gumbel_argmax(x, dim, keepdim=True, rng_state=state)

    for at in range(4):
        assert_same(vmap(sample, at)(logits), one_by_one(sample, logits.movedim(at, 0)))


def test_scalars_and_empty_batches(device, state, hard):
    sample = sampler(hard, state)
    scalars = torch.randn(BATCH, device=device)
    assert_same(vmap(sample)(scalars), one_by_one(sample, scalars))
    own = states(device)
    assert_same(
        vmap(lambda x, s: sample(x, state=s))(scalars, own),
        one_by_one(lambda x, s: sample(x, state=s), scalars, own),
    )
    slopes = vmap(grad(lambda x: sample(x)[0]))(scalars)
    assert not slopes.any()
    assert vmap(lambda x: gumbel_ext.gumbel_argmax(x, keepdim=True, rng_state=state))(
        scalars
    ).shape == (BATCH,)
    for shape in ((0, 3), (4, 3, 0), (4, 0, 3)):
        y, index = vmap(sample)(torch.zeros(shape, device=device))
        assert y.shape == shape
        assert index.shape == shape[:-1]
    empty, no_states = torch.zeros(0, 3, device=device), states(device, 0)
    assert vmap(lambda x, s: sample(x, state=s)[0])(empty, no_states).shape == (0, 3)
    noise = vmap(lambda s: gumbel_ext.gumbel_noise((3,), device=device, rng_state=s))(no_states)
    assert noise.shape == (0, 3)


def test_errors_speak_of_the_example(device, state):
    """Its shape and dimensions; a mask of too many must not line up with the batch's."""
    logits = torch.randn(4, 5, device=device)
    ones = torch.ones(4, 5, dtype=torch.bool, device=device)

    def call(**options):
        return vmap(lambda x: gumbel_ext.gumbel_softmax(x, rng_state=state, **options))(logits)

    with pytest.raises(ValueError, match=r"mask must broadcast .*\[5\], got shape \[4, 5\]"):
        call(mask=ones)
    with pytest.raises(ValueError, match=r"tau must broadcast .*\[5\], got shape \[4, 1\]"):
        call(tau=ones[:, :1].float())
    with pytest.raises(IndexError, match=r"dim must be between -1 and 0 .* 1 dimensions, got 1"):
        call(dim=1)
    with pytest.raises(ValueError, match="tau must be positive and finite, got -1"):
        vmap(lambda x, t: gumbel_ext.gumbel_softmax(x, t, rng_state=state))(
            logits, torch.tensor([1.0, 2.0, -1.0, 3.0], device=device)
        )


# ---- with derivatives ---------------------------------------------------------------------------


def weighted(sample):
    """A loss, squared so that it has second derivatives of its own."""

    def loss(logits, tau, mask):
        y = sample(logits, tau, mask)[0]
        return (y.square() * torch.arange(1.0, 6.0, device=y.device)).sum()

    return loss


@pytest.mark.usefixtures("no_loops")
@pytest.mark.feature(
    "vmap of grad, per-sample gradients", ops=("gumbel_softmax",), modes=("eager",)
)
@pytest.mark.feature("grad of vmap", ops=("gumbel_softmax",), modes=("eager",))
def test_gradients(batch, state, device, hard):
    loss = weighted(sampler(hard, state))
    slope = grad(loss, (0, 1))
    expected = one_by_one(slope, *batch)
    assert_same(vmap(slope)(*batch), expected)

    def total(*args):
        return vmap(loss)(*args).sum()

    assert_same(grad(total, (0, 1))(*batch), expected)
    leaves = [x.clone().requires_grad_() for x in batch[:2]]
    assert_same(torch.autograd.grad(total(*leaves, batch[2]), leaves), expected)

    def with_state(x, tau, mask, s):
        return grad(weighted(sampler(hard, s)), (0, 1))(x, tau, mask)

    args = (*batch, states(device))
    assert_same(vmap(with_state)(*args), one_by_one(with_state, *args))


@pytest.mark.usefixtures("no_loops")
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_gradients_of_drawn_samples(batch, hard, randomness):
    """The backward sees the noise of the forward: with each order of transforms, and without."""
    loss = weighted(sampler(hard))

    def total(*args):
        return vmap(loss, randomness=randomness)(*args).sum()

    if randomness == "different":
        expected = seeded(grad(loss, (0, 1)), *batch)
    else:
        expected = one_by_one(lambda *example: seeded(grad(loss, (0, 1)), *example), *batch)
    assert_same(seeded(vmap(grad(loss, (0, 1)), randomness=randomness), *batch), expected)
    assert_same(seeded(grad(total, (0, 1)), *batch), expected)
    leaves = [x.clone().requires_grad_() for x in batch[:2]]
    slopes = torch.autograd.grad(seeded(total, *leaves, batch[2]), leaves, create_graph=True)
    for a, b in zip(slopes, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    # Once more: a straight-through sample is recomputed for it.
    second = torch.autograd.grad(sum(x.square().sum() for x in slopes), leaves)
    wanted = seeded(
        grad(lambda *a: sum(x.square().sum() for x in grad(total, (0, 1))(*a)), (0, 1)), *batch
    )
    for a, b in zip(second, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.feature(
    "batched gradients (is_grads_batched)", ops=("gumbel_softmax",), modes=("eager",)
)
@pytest.mark.usefixtures("no_loops")
def test_batched_gradients(batch, state, hard):
    logits, tau = batch[0][1].requires_grad_(), batch[1][1].requires_grad_()
    y = sampler(hard, state)(logits, tau, batch[2][1])[0]
    seeds = torch.randn(6, *SHAPE, device=logits.device)
    actual = torch.autograd.grad(y, (logits, tau), seeds, is_grads_batched=True, retain_graph=True)
    expected = one_by_one(
        lambda seed: torch.autograd.grad(y, (logits, tau), seed, retain_graph=True), seeds
    )
    assert_same(actual, expected)


@pytest.mark.usefixtures("no_loops")
@pytest.mark.parametrize("batched", list(itertools.product((False, True), repeat=2)), ids=str)
def test_backward_ops(batch, state, hard, batched):
    """By one call, not by PyTorch's loop: with logits or y batched or not, the gradient or not."""
    logits, tau, mask = batch
    y, index, _ = OPS.gumbel_softmax(logits, 1.0, tau, False, -1, mask, True, None, state)
    grads = torch.randn_like(y)

    def slopes(g, x, k, t, m):
        if hard:
            return OPS.gumbel_softmax_hard_backward(g, x, k, 1.0, t, -1, m, state, True)
        return OPS.gumbel_softmax_backward(g, x, k, 1.0, t, -1, True)

    args = (grads, logits if hard else y, index, tau, mask)
    dims = [0 if batched[0] else None] + [0 if batched[1] else None] * 4
    if not any(batched):
        dims[3] = 0
    placed = [x if d == 0 else x[1] for x, d in zip(args, dims, strict=True)]
    alone = [x if d == 0 else x[1].expand_as(x) for x, d in zip(args, dims, strict=True)]
    assert_same(vmap(slopes, tuple(dims))(*placed), one_by_one(slopes, *alone))


@pytest.mark.feature(
    "vmap of grad, per-sample gradients", ops=("gumbel_softmax",), modes=("eager",)
)
def test_per_sample_gradients_of_a_model(device, hard):
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 5))
    model = model.to(device)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    data = torch.randn(7, 4, device=device)

    def loss(parameters, x, state):
        logits = functional_call(model, parameters, (x,))
        y = gumbel_ext.gumbel_softmax(logits, 0.7, hard, rng_state=state)
        return (y * torch.arange(5.0, device=device)).sum()

    own = states(device, 7)
    actual = vmap(grad(loss), (None, 0, 0))(parameters, data, own)
    for i in range(7):
        alone = grad(loss)(parameters, data[i], own[i])
        for name, value in alone.items():
            torch.testing.assert_close(actual[name][i], value, rtol=1e-5, atol=1e-6)
    jacobian = vmap(jacrev(lambda x: sampler(hard, own[0])(x)[0]))(data)
    for i in range(7):
        alone = jacrev(lambda x: sampler(hard, own[0])(x)[0])(data[i])
        torch.testing.assert_close(jacobian[i], alone, rtol=1e-5, atol=1e-6)


# ---- compiled -----------------------------------------------------------------------------------


@pytest.mark.feature("vmap randomness=same", ops=ALL_OPS, modes=("compiled",))
@pytest.mark.feature("vmap randomness=different", ops=ALL_OPS, modes=("compiled",))
@pytest.mark.feature("vmap with rng_state", ops=("gumbel_softmax",), modes=("compiled",))
@pytest.mark.feature("vmap over rng_state", ops=("gumbel_softmax",), modes=("compiled",))
@pytest.mark.feature("vmap, nested", ops=("gumbel_softmax",), modes=("compiled",))
@pytest.mark.feature(
    "vmap of grad, per-sample gradients", ops=("gumbel_softmax",), modes=("compiled",)
)
@pytest.mark.feature("grad of vmap", ops=("gumbel_softmax",), modes=("compiled",))
def test_compiled(batch, device, hard):
    """In one graph, one after the other, as eager with the same seed."""
    torch.compiler.reset()
    sample, own = sampler(hard), states(device)

    def everything(logits, tau, mask, own):
        results = []
        for mode in ("same", "different"):
            results += vmap(sample, randomness=mode)(logits, tau, mask)
            results.append(vmap(gumbel_ext.gumbel_argmax, randomness=mode)(logits))
            results.append(
                vmap(lambda x: x + gumbel_ext.gumbel_noise(SHAPE, device=device), randomness=mode)(
                    logits
                )
            )
            results += vmap(grad(weighted(sample), (0, 1)), randomness=mode)(logits, tau, mask)
        results += grad(
            lambda *args: vmap(weighted(sample), randomness="same")(*args, mask).sum(), (0, 1)
        )(logits, tau)
        results += vmap(vmap(sample, randomness="same"), randomness="different")(logits)
        results += vmap(lambda x, s: sample(x, state=s))(logits, own)
        results += vmap(lambda x: sample(x, state=own[0]))(logits)
        return tuple(results)

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    assert_same(seeded(compiled, *batch, own), seeded(everything, *batch, own))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_batch_size_does_not_recompile(device, hard, randomness):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    sample = vmap(sampler(hard), randomness=randomness)
    compiled = torch.compile(sample, fullgraph=True, backend=counter, dynamic=True)
    graphs = []
    for count in (4, 7, 3):
        logits = torch.randn(count, *SHAPE, device=device)
        assert_same(seeded(compiled, logits), seeded(sample, logits))
        graphs.append(counter.frame_count)
    # Dynamo traces the first call twice, for the number tau.
    assert graphs[0] == graphs[-1]


def errors(function, x):
    """What the error of a call says, and those behind it: Dynamo may raise one of its own."""
    try:
        function(x)
    except RuntimeError as raised:
        said, error = [], raised
        while error is not None:
            said.append(str(error))
            error = error.__cause__ or error.__context__
        return said
    return []


@pytest.mark.feature("vmap randomness=error", ops=("gumbel_softmax",), modes=("compiled",))
def test_error_mode_compiled(batch, hard):
    torch.compiler.reset()
    x = batch[0]
    compiled = torch.compile(vmap(sampler(hard)), backend="aot_eager")
    assert any(
        "called random operation while in randomness error" in t for t in errors(compiled, x)
    )
    # After an error, whoever raised it, Dynamo of torch 2.14 compiles no vmap until it is reset.
    torch.compiler.reset()
    fixed = vmap(sampler(hard, rng_state(device=x.device)))
    assert_same(torch.compile(fixed, fullgraph=True, backend="aot_eager")(x), fixed(x))


@pytest.mark.feature(
    "vmap, two calls in one graph differ", ops=("gumbel_softmax",), modes=("compiled",)
)
def test_two_calls_in_one_graph_draw_twice(device, hard):
    """Under vmap, in a training graph, whose equal calls AOTAutograd would merge."""
    torch.compiler.reset()
    sample = vmap(lambda x: gumbel_ext.gumbel_softmax(x, 1.0, hard), randomness="different")
    twice = torch.compile(lambda x: (sample(x), sample(x)), fullgraph=True, backend="aot_eager")
    first, second = twice(torch.zeros(4, 50, 10, device=device, requires_grad=True))
    assert not torch.equal(first, second)


def test_states_are_drawn_as_samples_are(device):
    """One for all examples, or one for each, as the generator gives them one after the other."""

    def draw(x):
        return gumbel_ext.draw_rng_state(device=x.device)

    x = torch.zeros(4, 10, device=device)
    with pytest.raises(RuntimeError, match="draw_rng_state: vmap: called random operation"):
        torch.vmap(draw)(x)
    torch.manual_seed(3)
    expected = [gumbel_ext.draw_rng_state(device=device) for _ in x]
    torch.manual_seed(3)
    assert torch.equal(torch.vmap(draw, randomness="same")(x), expected[0].expand(4, 2))
    torch.manual_seed(3)
    states = torch.vmap(draw, randomness="different")(x)
    assert torch.equal(states, torch.stack(expected))
    assert torch.vmap(draw, randomness="different")(x[:0]).shape == (0, 2)
    noise = torch.vmap(
        lambda x: gumbel_ext.gumbel_noise(10, device=x.device, rng_state=draw(x)),
        randomness="different",
    )(x)
    assert noise.unique(dim=0).shape == noise.shape
