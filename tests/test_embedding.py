"""Codebook lookup: the sample times the codebook, and nowhere the sample."""

import itertools

import pytest
import torch
from oracle import (
    DTYPES,
    SIXTEEN_BIT,
    eps,
    layouts,
    lookup_inputs,
    noise,
    row_shape,
    runs_cpu_kernels,
)
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
    # The tensor cores of a GPU take a 16-bit codebook with samples and gradients rounded to its
    # dtype: an error of each product, of which a sum may have many that nearly cancel.
    if not runs_cpu_kernels(logits.device) and weight.dtype in SIXTEEN_BIT:
        slack = slack + 2 * eps(weight.dtype) * (logits.dtype != torch.float64)

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
    compare(*lookup_inputs(shape, book, device, dtype), hard, dim, state)


@small_case
def test_gradient_of_temperatures_of_rows(shape, dim, book, hard, state, device):
    logits, weight = lookup_inputs(shape, book, device, torch.float64)
    compare(logits, weight, hard, dim, state, learn_tau=True)


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codebook_of_another_dtype(dtype, weight_dtype, hard, state, device):
    logits, weight = lookup_inputs((40, 4, 12), (2, 6, 9), device, dtype, weight_dtype)
    compare(logits, weight, hard, -1, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@small_case
def test_mask(shape, dim, book, dtype, hard, state, device):
    logits, weight = lookup_inputs(shape, book, device, dtype)
    mask = torch.rand(shape, device=device) < 0.6
    mask.select(0 if dim else -1, 0).fill_(False)
    _, _, (grad_logits, _) = compare(logits, weight, hard, dim, state, mask=mask)
    assert not grad_logits[~mask].any()
    # One that broadcasts: of classes alone, of rows alone.
    of_classes = torch.rand(shape[dim], device=device) < 0.6
    of_classes = of_classes.view(-1, *[1] * (len(shape) - 1 - dim % len(shape)))
    compare(logits, weight, hard, dim, state, mask=of_classes)
    of_rows = torch.rand(row_shape(shape, dim)) < 0.6
    out, _, _ = compare(logits, weight, hard, dim, state, mask=of_rows.to(device))
    assert not out.movedim(dim, -1)[~of_rows.squeeze(dim)].any()


@small_case
def test_index_is_that_of_the_sample(shape, dim, book, state, device):
    """Groups have the noise of logits viewed with a dimension for them."""
    logits, weight = lookup_inputs(shape, book, device)
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
    logits, weight = lookup_inputs((6, 10), (10, 3), device)
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
        logits, weight = lookup_inputs(shape, book, device)
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
        logits, weight = lookup_inputs(shape, book, device)
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
    logits, weight = lookup_inputs((6, 2, 5), (5, 3), device, dtype)
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
        logits, weight = lookup_inputs((4000, 120), book, "cpu", dtype)
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
    logits, weight = lookup_inputs((6, 10), (10, 3), device)
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
    logits, weight = lookup_inputs(shape, book, "cpu")
    # Logits as a network makes them: of a leaf there would be a copy.
    leaves = (logits.requires_grad_().clone(), weight.requires_grad_())
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
    if runs_cpu_kernels("cpu"):  # a GPU does not look before its kernel runs
        with pytest.raises(IndexError, match="index must be between -1 and 3, got 4"):
            backward(index=index + 4)
