"""Codebook lookup: the sample times the codebook, and nowhere the sample."""

import itertools

import pytest
import torch
from oracle import DTYPES, SIXTEEN_BIT, eps, layouts, noise, rng_state
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

import gumbel_ext
from gumbel_ext import _reference, gumbel_embedding, gumbel_softmax

_ops = torch.ops.gumbel_ext

# Shape of logits, dim, shape of the codebook.
CASES = {
    "rows": ((37, 11), -1, (11, 5)),
    "one_class": ((6, 1), -1, (1, 3)),
    "one_column": ((50, 7), 1, (7, 1)),
    "first_dim": ((9, 40), 0, (9, 33)),
    "vector": ((13,), 0, (13, 4)),
    "images": ((3, 24, 5, 7), 1, (24, 70)),
    "groups": ((5, 9, 12), -1, (3, 4, 6)),
    "groups_of_images": ((2, 14, 3, 4), 1, (2, 7, 5)),
    "groups_of_one": ((8, 3), -1, (3, 1, 2)),
    "one_group": ((8, 3), -1, (1, 3, 2)),
    "tiles": ((300, 4000), -1, (4000, 3)),
    "tiles_of_images": ((2, 5000, 5, 29), 1, (5000, 2)),
}
case = pytest.mark.parametrize(("shape", "dim", "book"), CASES.values(), ids=CASES)
small_case = pytest.mark.parametrize(
    ("shape", "dim", "book"), list(CASES.values())[:10], ids=list(CASES)[:10]
)


def inputs(shape, book, device, dtype=torch.float32, weight_dtype=None):
    logits = torch.randn(shape, dtype=torch.float64)
    weight = torch.randn(book, dtype=torch.float64)
    return logits.to(device, dtype), weight.to(device, weight_dtype or dtype)


def exact(*tensors):
    """Leaves in float64 on the CPU."""
    return [t.detach().cpu().double().requires_grad_() for t in tensors]


def compare(logits, weight, hard, dim, state, tau=0.7, mask=None, learn_tau=False):
    """Value, index and all gradients of a random-weighted sum, against float64."""
    if learn_tau:
        shape = list(logits.shape)
        shape[dim] = 1
        tau = (torch.rand(shape, dtype=torch.float64, device=logits.device) + 0.5).requires_grad_()
    leaves = [logits.detach().requires_grad_(), weight.detach().requires_grad_()]
    out, index = gumbel_embedding(
        *leaves, tau, hard, dim, mask=mask, return_index=True, rng_state=state
    )
    assert out.dtype == weight.dtype
    assert out.is_contiguous()
    grad = torch.randn(out.shape, dtype=torch.float64).to(out)

    true = exact(logits, weight)
    true_tau = exact(tau)[0] if learn_tau else tau
    g = noise(logits.shape)
    true_mask = None if mask is None else mask.cpu()
    expected, expected_index = _reference.gumbel_embedding(
        *true, true_tau, hard, dim, mask=true_mask, noise=g
    )
    assert torch.equal(index.cpu(), expected_index)
    assert index.dtype == torch.int64
    # Relative to the largest entry: sums have terms of both signs. Products are taken in float32,
    # or float64 if either is of it; the sample is of the dtype that logits are computed in.
    double_only = logits.dtype == weight.dtype == torch.float64
    slack = 512 * eps(torch.float64 if double_only else torch.float32)

    def close(actual, reference, dtype):
        assert actual.dtype == dtype
        size = reference.abs().max().clamp(min=1e-300) if reference.numel() else 0
        error = (actual.detach().cpu().double() - reference).abs()
        allowed = 2 * eps(dtype) * reference.abs() + slack * size
        if dtype == torch.float16:
            allowed = allowed + 2.0**-24
        assert (error <= allowed).all(), f"worst by {(error - allowed).max():.3g} of {size:.3g}"

    if hard:
        # A copy of rows.
        assert torch.equal(out.detach().cpu().double(), expected.detach())
    else:
        close(out, expected.detach(), weight.dtype)
    if learn_tau:
        leaves, true = [*leaves, tau], [*true, true_tau]
    actual = torch.autograd.grad(out, leaves, grad)
    wanted = torch.autograd.grad(expected, true, grad.cpu().double())
    for a, w, leaf in zip(actual, wanted, leaves, strict=True):
        assert a.shape == leaf.shape
        close(a, w, leaf.dtype)
    return out, index, actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@case
def test_against_the_product_with_the_sample(shape, dim, book, dtype, hard, state, device):
    if dtype in SIXTEEN_BIT and max(shape) > 2000:
        pytest.skip("tiles are those of float32")
    compare(*inputs(shape, book, device, dtype), hard, dim, state)


@small_case
def test_gradient_of_temperatures_of_rows(shape, dim, book, hard, state, device):
    logits, weight = inputs(shape, book, device, torch.float64)
    compare(logits, weight, hard, dim, state, learn_tau=True)


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codebook_of_another_dtype(dtype, weight_dtype, hard, state, device):
    logits, weight = inputs((40, 4, 12), (2, 6, 9), device, dtype, weight_dtype)
    compare(logits, weight, hard, -1, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@small_case
def test_mask(shape, dim, book, dtype, hard, state, device):
    logits, weight = inputs(shape, book, device, dtype)
    mask = torch.rand(shape, device=device) < 0.6
    mask.select(0 if dim else -1, 0).fill_(False)
    _, _, (grad_logits, _) = compare(logits, weight, hard, dim, state, mask=mask)
    assert not grad_logits[~mask].any()
    # One that broadcasts: of classes alone, of rows alone.
    of_classes = torch.rand(shape[dim], device=device) < 0.6
    of_classes = of_classes.view(-1, *[1] * (len(shape) - 1 - dim % len(shape)))
    compare(logits, weight, hard, dim, state, mask=of_classes)
    of_rows = torch.rand([1 if d == dim % len(shape) else n for d, n in enumerate(shape)]) < 0.6
    out, _, _ = compare(logits, weight, hard, dim, state, mask=of_rows.to(device))
    assert not out.movedim(dim, -1)[~of_rows.squeeze(dim)].any()


@small_case
def test_index_is_that_of_the_sample(shape, dim, book, state, device):
    """Groups have the noise of logits viewed with a dimension for them."""
    logits, weight = inputs(shape, book, device)
    _, index = gumbel_embedding(logits, weight, dim=dim, return_index=True, rng_state=state)
    if len(book) == 3:
        dim %= len(shape)
        logits, dim = logits.unflatten(dim, book[:2]), dim + 1
    _, expected = gumbel_softmax(logits, hard=True, dim=dim, return_index=True, rng_state=state)
    assert torch.equal(index, expected)
    rows = weight[index] if len(book) == 2 else weight[0][index[..., 0]] if book[0] == 1 else None
    if rows is not None and len(shape) == 2 and dim in (-1, 1):
        assert torch.equal(gumbel_embedding(logits.flatten(1), weight, rng_state=state), rows)


def test_one_draw_a_call(hard, device):
    logits, weight = inputs((6, 10), (10, 3), device)
    generator = torch.Generator(device).manual_seed(5)
    state = gumbel_ext.draw_rng_state(generator)
    after = generator.get_state()
    generator.manual_seed(5)
    drawn = gumbel_embedding(logits, weight, hard=hard, generator=generator)
    assert torch.equal(drawn, gumbel_embedding(logits, weight, hard=hard, rng_state=state))
    assert torch.equal(generator.get_state(), after)
    assert not torch.equal(drawn, gumbel_embedding(logits, weight, hard=False))
    # The state is kept as it was.
    leaf = logits.requires_grad_()
    out = gumbel_embedding(leaf, weight, hard=hard, rng_state=state)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, leaf, grad, retain_graph=True)[0]
    state += 3
    assert torch.equal(torch.autograd.grad(out, leaf, grad)[0], expected)


def test_memory_layouts(hard, state, device):
    for shape, dim, book in (((6, 20, 5), 1, (2, 10, 3)), ((7, 12), -1, (12, 4))):
        logits, weight = inputs(shape, book, device)
        expected = None
        for (_, x), (_, w) in itertools.product(layouts(logits), layouts(weight)):
            x, w = x.requires_grad_(), w.detach().requires_grad_()
            out = gumbel_embedding(x, w, 0.6, hard, dim, rng_state=state)
            grad = torch.arange(out.numel(), device=device).cos().view(out.shape)
            results = (out.detach(), *torch.autograd.grad(out, (x, w), grad))
            expected = expected or results
            for a, b in zip(results, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    x = torch.randn(1, 12, device=device).expand(7, 12).requires_grad_()
    for layout in (x, x.detach().contiguous().requires_grad_()):
        compare(layout, weight, hard, -1, state)
    # A codebook that groups share.
    shared = torch.randn(4, 3, device=device, requires_grad=True)
    logits = torch.randn(5, 8, device=device)
    out = gumbel_embedding(logits, shared.expand(2, 4, 3), hard=hard, rng_state=state)
    grad = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, shared, grad)
    own = shared.detach().expand(2, 4, 3).contiguous().requires_grad_()
    out = gumbel_embedding(logits, own, hard=hard, rng_state=state)
    torch.testing.assert_close(gradient, torch.autograd.grad(out, own, grad)[0].sum(0))


def test_without_elements(hard, device):
    for shape, dim, book, out_shape in (
        ((0, 4), -1, (4, 3), (0, 3)),
        ((5, 0), -1, (0, 3), (5, 3)),
        ((5, 4), -1, (4, 0), (5, 0)),
        ((2, 6, 0), 1, (2, 3, 4), (2, 8, 0)),
        ((5, 0), -1, (2, 0, 3), (5, 6)),
        ((5, 0), -1, (0, 2, 3), (5, 0)),
    ):
        logits, weight = inputs(shape, book, device)
        leaves = (logits.requires_grad_(), weight.requires_grad_())
        out, index = gumbel_embedding(*leaves, 0.5, hard, dim, return_index=True)
        assert out.shape == out_shape
        assert not out.any()
        assert index.shape == (
            (*shape[: dim % len(shape)], *book[:1], *shape[dim % len(shape) + 1 :])
            if len(book) == 3
            else tuple(n for d, n in enumerate(shape) if d != dim % len(shape))
        )
        gradients = torch.autograd.grad(out, leaves, torch.ones_like(out))
        for leaf, gradient in zip(leaves, gradients, strict=True):
            assert gradient.shape == leaf.shape
            assert not gradient.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_a_largest_logit(dtype, hard, state, device):
    logits, weight = inputs((6, 2, 5), (5, 3), device, dtype)
    logits[1, 0, 2] = torch.nan
    logits[2, 1] = -torch.inf
    logits[3, 0, 4] = torch.inf
    logits[4, 1, :4] = -torch.inf
    weight[1, 1] = torch.inf
    leaf = logits.requires_grad_()
    out, index = gumbel_embedding(leaf, weight, 0.5, hard, return_index=True, rng_state=state)
    lost = torch.zeros(6, 2, dtype=torch.bool, device=device)
    lost[1, 0] = lost[2, 1] = True
    assert out[lost].isnan().all()
    assert index[3, 0] == 4
    assert index[4, 1] == 4
    if hard:
        # A row that was not chosen has no part in the others, infinite or not.
        assert torch.equal(out[~lost], weight[index[~lost]])
    weight[1, 1] = 0
    out = gumbel_embedding(leaf, weight, 0.5, hard, rng_state=state)
    (gradient,) = torch.autograd.grad(out[~lost], leaf, torch.randn_like(out[~lost]))
    lost[3, 0] = True  # +inf has no softmax
    assert gradient[~lost].isfinite().all()
    assert gradient[5].abs().sum() > 0


@pytest.mark.cpu_only(reason="about the threads of the CPU kernels")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_for_every_number_of_threads(dtype, thread_count, state):
    """Also of a codebook that has collapsed to one row."""
    for collapsed, book in itertools.product((False, True), ((2, 60, 7), (2, 60, 130))):
        logits, weight = inputs((4000, 120), book, "cpu", dtype)
        if collapsed:
            logits[:, 3] = 1e4
        weight.requires_grad_()
        results = []
        grad = torch.randn(4000, 2 * book[2]).to(dtype)
        for count in (1, 2, 3, 8):
            thread_count(count)
            out = gumbel_embedding(logits, weight, rng_state=state)
            results.append((out.detach(), *torch.autograd.grad(out, weight, grad)))
        for out, gradient in results[1:]:
            assert torch.equal(out, results[0][0])
            assert torch.equal(gradient, results[0][1])
        # Rounded once: within a unit in the last place of the exact sum.
        index = gumbel_embedding(logits, weight, return_index=True, rng_state=state)[1]
        if dtype != torch.float64:
            of_groups = grad.double().view(4000, 2, book[2])
            exact_sum = torch.zeros(book, dtype=torch.float64)
            for g in range(2):
                exact_sum[g].index_add_(0, index[:, g], of_groups[:, g])
            size = exact_sum.abs().clamp(min=torch.finfo(dtype).smallest_normal)
            assert ((results[0][1].double() - exact_sum).abs() <= 0.51 * eps(dtype) * size).all()


def test_only_what_is_asked_for_is_computed(hard, state, device):
    logits, weight = inputs((6, 10), (10, 3), device)
    grad = torch.randn(6, 3, device=device)
    whole = gumbel_embedding(
        *(leaves := (logits.requires_grad_(), weight.requires_grad_())), 0.5, hard, rng_state=state
    )
    both = torch.autograd.grad(whole, leaves, grad, retain_graph=True)
    for i, leaf in enumerate(leaves):
        assert torch.equal(torch.autograd.grad(whole, leaf, grad, retain_graph=True)[0], both[i])
    index = gumbel_embedding(logits, weight, return_index=True, rng_state=state)[1]
    rest = (grad, logits.detach(), weight.detach(), index, 0.5, None, hard, -1, None, state)
    for wanted in itertools.product((False, True), repeat=3):
        found = _ops.gumbel_embedding_backward(*rest, *wanted)
        shapes = ((6, 10), (10, 3), (6, 1))
        for gradient, shape, w in zip(found, shapes, wanted, strict=True):
            assert gradient.shape == (shape if w else (0,))


# ---- memory -------------------------------------------------------------------------------------


def largest_and_peak(call):
    """Of the CPU allocator while a call runs: the largest block, and the most that was held."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = call()
    events = list(seen.profiler.kineto_results.experimental_event_tree())
    found = []
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.typed[1].alloc_size))
    del result
    level = peak = 0
    for _, size in sorted(found):
        level += size
        peak = max(peak, level)
    return max(size for _, size in found), peak


@pytest.mark.cpu_only(reason="the profiler's record of the CPU allocator")
@pytest.mark.parametrize(
    ("shape", "dim", "book"),
    [((6000, 640), -1, (2, 320, 24)), ((3, 4096, 17, 31), 1, (4096, 16))],
    ids=["groups", "images"],
)
def test_memory(shape, dim, book):
    logits, weight = inputs(shape, book, "cpu")
    leaves = (logits.requires_grad_(), weight.requires_grad_())
    rows = logits.numel() // book[-2]
    of_rows, of_codebook, of_logits = 4 * rows * book[-1], 4 * weight.numel(), 4 * logits.numel()
    small = 1 << 16
    # Index, codes, flags of a row; rows, and for images rows with the other order of dimensions.
    row = 8 * 8 * rows
    _, peak = largest_and_peak(lambda: gumbel_embedding(*leaves, dim=dim))
    assert peak <= 2 * of_rows + row + small
    assert peak < of_logits / 2

    out = gumbel_embedding(*leaves, dim=dim)
    grad = torch.randn_like(out)
    tile = 4 << 20
    _, peak = largest_and_peak(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True))
    assert peak <= of_logits + 2 * of_rows + 2 * of_codebook + row + tile + small
    assert peak < 1.7 * of_logits

    def soft():
        return gumbel_embedding(*leaves, hard=False, dim=dim)

    largest, peak = largest_and_peak(soft)
    assert largest < of_logits / 2
    assert peak <= 2 * of_rows + row + 2 * tile + of_codebook + small
    out = soft()
    _, peak = largest_and_peak(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True))
    assert peak <= of_logits + 2 * of_rows + 2 * of_codebook + row + 3 * tile + small


# ---- derivatives of a higher order, transforms --------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dim", "book"), [((3, 5), -1, (5, 2)), ((2, 6, 3), 1, (2, 3, 2))], ids=str
)
def test_gradcheck(shape, dim, book, state, device):
    logits, weight = inputs(shape, book, device, torch.float64)
    tau = torch.tensor(0.8, dtype=torch.float64, device=device, requires_grad=True)

    def soft(logits, weight, tau):
        return gumbel_embedding(logits, weight, tau, False, dim, rng_state=state)

    leaves = (logits.requires_grad_(), weight.requires_grad_(), tau)
    assert torch.autograd.gradcheck(soft, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(soft, leaves)


def composite(logits, weight, tau, hard, dim, state, mask=None):
    """The product with this package's own sample."""
    if weight.dim() == 2:
        y = gumbel_softmax(logits, tau, hard, dim=dim, mask=mask, rng_state=state)
        return (y.movedim(dim, -1) @ weight).movedim(-1, dim)
    dim %= logits.dim()
    y = gumbel_softmax(
        logits.unflatten(dim, weight.shape[:2]), tau, hard, dim=dim + 1, rng_state=state
    )
    rows = torch.einsum("...gv,gvd->...gd", y.movedim((dim, dim + 1), (-2, -1)), weight)
    return rows.flatten(-2).movedim(-1, dim)


@pytest.mark.parametrize(
    ("shape", "dim", "book"), [((3, 5), -1, (5, 2)), ((2, 6, 3), 1, (2, 3, 2))], ids=str
)
def test_higher_orders_are_those_of_the_product(shape, dim, book, hard, state, device):
    logits, weight = inputs(shape, book, device, torch.float64)
    tau = torch.tensor(0.8, dtype=torch.float64, device=device, requires_grad=True)
    leaves = (logits.requires_grad_(), weight.requires_grad_(), tau)
    second = []
    for function in (gumbel_embedding, composite):
        if function is gumbel_embedding:
            out = gumbel_embedding(*leaves, hard, dim, rng_state=state)
        else:
            out = composite(*leaves, hard, dim, state)
        torch.manual_seed(3)
        # Not randn_like, whose values go by the order in memory.
        grad = torch.randn(out.shape, dtype=out.dtype).to(device)
        first = torch.autograd.grad(out, leaves, grad, create_graph=True)
        total = sum((g * torch.randn(g.shape, dtype=g.dtype).to(device)).sum() for g in first)
        second.append((*first, *torch.autograd.grad(total, leaves)))
    for a, b in zip(*second, strict=True):
        torch.testing.assert_close(a, b)


def test_transforms(hard, state, device):
    logits, weight = inputs((4, 3, 6), (6, 2), device, torch.float64)

    def lookup(x, w):
        return gumbel_embedding(x, w, 0.7, hard, rng_state=state)

    def plain(x, w):
        return composite(x, w, 0.7, hard, -1, state)

    tangents = (torch.randn_like(logits), torch.randn_like(weight))
    for a, b in zip(
        torch.func.jvp(lookup, (logits, weight), tangents),
        torch.func.jvp(plain, (logits, weight), tangents),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    grads = [
        torch.vmap(torch.func.grad(lambda x, w, f=f: f(x, w).cos().sum(), (0, 1)), (0, None))(
            logits, weight
        )
        for f in (lookup, plain)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("book", [(6, 2), (2, 3, 4)], ids=["", "groups"])
def test_vmap(book, hard, state, device):
    logits, weight = inputs((4, 3, 6), book, device)
    books = torch.randn(4, *book, device=device)
    mask = torch.rand(4, 3, 6, device=device) < 0.8

    def lookup(x, w, m=None, s=None):
        return gumbel_embedding(x, w, 0.7, hard, mask=m, return_index=True, rng_state=s)

    def same(actual, expected):
        torch.testing.assert_close(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])

    def one_by_one(*args):
        results = [lookup(*(a[i] for a in args), s=state) for i in range(4)]
        return [torch.stack(parts) for parts in zip(*results, strict=True)]

    each = weight.expand(4, *book)
    same(
        torch.vmap(lambda x, m: lookup(x, weight, m, state))(logits, mask),
        one_by_one(logits, each, mask),
    )
    same(torch.vmap(lambda x, w: lookup(x, w, s=state))(logits, books), one_by_one(logits, books))
    same(
        torch.vmap(lambda w: lookup(logits[0], w, s=state))(books),
        one_by_one(logits[:1].expand_as(logits), books),
    )
    states = torch.stack([state + i for i in range(4)])
    results = [lookup(logits[i], weight, s=states[i]) for i in range(4)]
    same(
        torch.vmap(lambda x, s: lookup(x, weight, s=s))(logits, states),
        [torch.stack(parts) for parts in zip(*results, strict=True)],
    )
    # As one call on the whole batch, whether the codebook has the batch dimension or not.
    torch.manual_seed(1)
    whole = lookup(logits, weight)
    for w, dims in ((weight, (0, None)), (each, (0, 0))):
        torch.manual_seed(1)
        same(torch.vmap(lookup, dims, randomness="different")(logits, w), whole)
    torch.manual_seed(1)
    single = lookup(logits[0], weight)
    for w, dims in ((weight, (0, None)), (each, (0, 0))):
        torch.manual_seed(1)
        actual = torch.vmap(lookup, dims, randomness="same")(logits, w)
        same([part[0] for part in actual], single)
    with pytest.raises(RuntimeError, match="gumbel_embedding: vmap"):
        torch.vmap(lookup, (0, None))(logits, weight)
    # Below the transform autograd runs as ever.
    leaf = weight.clone().requires_grad_()
    out = torch.vmap(lambda x: gumbel_embedding(x, leaf, 0.7, hard, rng_state=state))(logits)
    grad = torch.randn_like(out)
    expected = torch.stack([gumbel_embedding(x, leaf, 0.7, hard, rng_state=state) for x in logits])
    torch.testing.assert_close(
        torch.autograd.grad(out, leaf, grad), torch.autograd.grad(expected, leaf, grad)
    )


# ---- what PyTorch asks of an op -----------------------------------------------------------------


def test_opcheck(hard, device):
    logits, weight = inputs((3, 6, 2), (2, 3, 4), device)
    tau = torch.rand(3, 1, 2, device=device).add(0.5).requires_grad_()
    mask = torch.rand(6, 1, device=device) < 0.7
    args = (logits.requires_grad_(), weight.requires_grad_(), 1.0, tau, hard, 1, mask, None)
    # What is traced is the same for both.
    utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
    utils += ["test_aot_dispatch_dynamic"] if hard else []
    op = _ops.gumbel_embedding.default
    torch.library.opcheck(op, (*args, rng_state(device=device)), test_utils=utils)
    out, index, state = _ops.gumbel_embedding(*args, None)
    op = _ops.gumbel_embedding_backward.default
    rest = (torch.randn_like(out), logits, weight, index, *args[2:7], state, True, True, True)
    torch.library.opcheck(op, rest, test_utils=utils)


def test_compile(hard, state, device):
    logits, weight = inputs((4, 9), (9, 3), device)
    leaves = (logits.requires_grad_(), weight.requires_grad_())

    def lookup(x, w, tau, s):
        return gumbel_embedding(x, w, tau, hard, return_index=True, rng_state=s)

    compiled = torch.compile(lookup, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (4, 3):
        x = logits[:rows]
        out, index = compiled(x, weight, 0.7, state)
        expected, expected_index = lookup(x, weight, 0.7, state)
        assert torch.equal(out, expected)
        assert torch.equal(index, expected_index)
        grad = torch.randn_like(out)
        for a, b in zip(
            torch.autograd.grad(out, leaves, grad),
            torch.autograd.grad(expected, leaves, grad),
            strict=True,
        ):
            assert torch.equal(a, b)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def twice(x, w):
        return gumbel_embedding(x, w, hard=False), gumbel_embedding(x, w, hard=False)

    first, second = twice(*leaves)
    assert not torch.equal(first, second)


def test_export(hard, state, device):
    class Quantizer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(2, 4, 3, device=device))

        def forward(self, logits, s):
            return gumbel_embedding(logits, self.weight, 0.5, hard, rng_state=s)

    module, logits = Quantizer(), torch.randn(5, 8, device=device)
    program = torch.export.export(module, (logits, state), strict=False)
    assert torch.equal(program.module()(logits, state), module(logits, state))


def test_autocast_leaves_the_dtypes(hard, state, device):
    logits, weight = inputs((4, 9), (9, 3), device, torch.bfloat16, torch.float32)
    with torch.autocast(device, torch.bfloat16):
        out = gumbel_embedding(logits, weight, 0.7, hard, rng_state=state)
    assert out.dtype == torch.float32
    assert torch.equal(out, gumbel_embedding(logits, weight, 0.7, hard, rng_state=state))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_form_for_devices_without_a_kernel(dtype, hard, state, device):
    """The one in PyTorch's operators, here on any device."""
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    forward, backward = _ops.gumbel_embedding.default, _ops.gumbel_embedding_backward.default
    logits, weight = inputs((5, 8, 40), (2, 4, 3), device, dtype)
    logits[0, 0, 3] = torch.nan
    mask = torch.rand(8, 40, device=device) < 0.7
    mask[:4, 3] = False
    tau = torch.rand(5, 1, 40, device=device) + 0.5
    for t, m in ((None, None), (tau, mask)):
        args = (0.8, t, hard, 1, m)
        results = [
            call(logits, weight, *args, None, state)
            for call in (forward, lambda *a: forward._op_dk(key, *a))
        ]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)
        rest = (torch.randn_like(results[0][0]), logits, weight, results[0][1], *args, state)
        for a, b in zip(
            backward(*rest, True, True, True),
            backward._op_dk(key, *rest, True, True, True),
            strict=True,
        ):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, equal_nan=True)


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"logits": [1.0]}, TypeError, "logits must be a tensor, got list"),
        (
            {"logits": torch.tensor(1.0)},
            ValueError,
            r"logits must have a dimension, got shape \[\]",
        ),
        ({"logits": torch.ones(2, 4).int()}, TypeError, "logits must have dtype"),
        ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
        ({"weight": torch.ones(4)}, ValueError, r"weight must be of shape .*, got shape \[4\]"),
        ({"weight": torch.ones(5, 3)}, ValueError, r"weight must have 4 rows.* got 5 in shape \[5"),
        ({"weight": torch.ones(2, 4, 3)}, ValueError, "weight must have 4 rows.* got 8 in shape"),
        ({"weight": torch.ones(4, 3).int()}, TypeError, "weight must have dtype .*, got Int"),
        ({"weight": torch.ones(4, 3).to_sparse()}, TypeError, "weight must be a dense"),
        ({"weight": torch.ones(4, 3, device="meta")}, ValueError, "weight must be on the device"),
        ({"tau": 0.0}, ValueError, "tau must be positive and finite, got 0"),
        ({"tau": torch.tensor([-1.0])}, ValueError, "tau must be positive and finite, got -1"),
        ({"tau": torch.ones(4)}, ValueError, r"tau must broadcast to \[2, 1\]"),
        ({"dim": 2}, IndexError, "dim must be between -2 and 1 .* got 2"),
        ({"dim": 0.0}, TypeError, "dim must be an int, got 0.0"),
        ({"mask": torch.ones(4)}, TypeError, "mask must have dtype bool"),
        ({"mask": torch.ones(3, 4).bool()}, ValueError, "mask must broadcast"),
        ({"rng_state": torch.ones(3).long()}, ValueError, "rng_state must be an int64 tensor"),
    ],
)
def test_errors_name_the_argument_and_its_value(arguments, error, words):
    with pytest.raises(error, match=f"gumbel_embedding: {words}"):
        gumbel_embedding(**({"logits": torch.ones(2, 4), "weight": torch.ones(4, 3)} | arguments))


def test_errors_of_the_backward():
    logits, weight, grad = torch.ones(2, 4), torch.ones(4, 3), torch.ones(2, 3)
    index, state = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)

    def backward(grad=grad, index=index):
        rest = (1.0, None, True, -1, None, state, False, True, False)
        return _ops.gumbel_embedding_backward(grad, logits, weight, index, *rest)

    with pytest.raises(ValueError, match=r"grad must have shape \[2, 3\].*got \[2, 4\]"):
        backward(grad=logits)
    with pytest.raises(TypeError, match="grad must have dtype Float, got Double"):
        backward(grad=grad.double())
    with pytest.raises(ValueError, match=r"index must have shape \[2\], got \[1\]"):
        backward(index=index[:1])
    with pytest.raises(IndexError, match="index must be between -1 and 3, got 4"):
        backward(index=index + 4)
