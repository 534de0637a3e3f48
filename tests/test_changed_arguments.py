"""Arguments that change between forward and backward: the forward's gradient, or one line of error.

A fused optimizer and writes through ``.data`` or NumPy leave no trace that autograd could see.
"""

import pytest
import torch

import gumbel_ext

ROWS, CLASSES = 6, 5


def sampler(function, *arguments, **keywords):
    return lambda x, tau, state: function(x, *arguments, tau=tau, rng_state=state, **keywords)


def codebook():
    return torch.linspace(-1, 1, CLASSES * 3).view(CLASSES, 3)


def simplex():
    return torch.linspace(-1, 1, ROWS * CLASSES).view(ROWS, CLASSES).softmax(-1)


OPS = {
    "gumbel_softmax": sampler(gumbel_ext.gumbel_softmax),
    "gumbel_softmax, hard": sampler(gumbel_ext.gumbel_softmax, hard=True),
    "gumbel_softmax, masked": lambda x, tau, state: gumbel_ext.gumbel_softmax(
        x, tau, True, mask=torch.eye(ROWS, CLASSES).logical_not(), rng_state=state
    ),
    "gumbel_topk": lambda x, tau, state: gumbel_ext.gumbel_topk(
        x, 3, return_log_prob=True, rng_state=state
    )[1],
    "relaxed_topk": sampler(gumbel_ext.relaxed_topk, 2),
    "relaxed_topk, hard": sampler(gumbel_ext.relaxed_topk, 2, hard=True),
    "gumbel_log_softmax": sampler(gumbel_ext.gumbel_log_softmax),
    "concrete_log_prob": lambda x, tau, state: gumbel_ext.concrete_log_prob(simplex(), x, tau),
    "binary_concrete": sampler(gumbel_ext.binary_concrete),
    "binary_concrete, hard": sampler(gumbel_ext.binary_concrete, hard=True),
    "binary_concrete_log_prob": lambda x, tau, state: gumbel_ext.binary_concrete_log_prob(
        simplex(), x, tau
    ),
    "decoupled_gumbel_softmax": lambda x, tau, state: gumbel_ext.decoupled_gumbel_softmax(
        x, 0.7, tau, rng_state=state
    ),
    "decoupled_gumbel_softmax, hard": lambda x, tau, state: gumbel_ext.decoupled_gumbel_softmax(
        x, 0.7, tau, True, rng_state=state
    ),
    "straight_through_softmax": lambda x, tau, state: gumbel_ext.straight_through_softmax(x, tau),
    "soft_argmax": lambda x, tau, state: gumbel_ext.soft_argmax(x, tau),
    "soft_argmax_2d": lambda x, tau, state: gumbel_ext.soft_argmax_2d(
        x.unflatten(-1, (1, CLASSES)), tau.unsqueeze(-1)
    ),
    "gumbel_embedding": lambda x, tau, state: gumbel_ext.gumbel_embedding(
        x, codebook(), tau, rng_state=state
    ),
    "gumbel_embedding, hard": lambda x, tau, state: gumbel_ext.gumbel_embedding(
        x, codebook(), tau, True, rng_state=state
    ),
}


def estimator(name):
    """Of a temperature that is no parameter."""
    function = getattr(gumbel_ext, name)

    def call(x, tau, state):
        tempered = {} if name == "zgr" else {"tau": tau.detach()}
        return function(x, rng_state=state, **tempered)

    return call


ESTIMATORS = {
    name: estimator(name) for name in ("gumbel_rao", "zgr", "reinmax", "gapped_straight_through")
}
EVERY = {**OPS, **ESTIMATORS}


def fused(optimizer, **options):
    def step(p):
        p.grad = torch.linspace(-2, 2, p.numel()).view(p.shape)
        optimizer([p], lr=0.5, fused=True, **options).step()
        p.grad = None

    return step


def without_grad(p):
    with torch.no_grad():
        p.mul_(torch.linspace(0.1, 3, p.numel()).view(p.shape))


def numpy_write(p):
    p.detach().numpy()[:] *= 3


def plain_step(p):
    p.grad = torch.linspace(-2, 2, p.numel()).view(p.shape)
    torch.optim.SGD([p], lr=0.1).step()


UNSEEN = {
    "data": lambda p: p.data.mul_(torch.linspace(0.1, 3, p.numel()).view(p.shape)),
    "data.copy_": lambda p: p.data.copy_(torch.linspace(0.1, 1, p.numel()).view(p.shape)),
    "numpy": numpy_write,
    "Adam": fused(torch.optim.Adam),
    "AdamW": fused(torch.optim.AdamW),
    "SGD": fused(torch.optim.SGD),
    "Adagrad": fused(torch.optim.Adagrad),
}
SEEN = {"no_grad": without_grad, "step": plain_step}
VIEWS = {
    "leaf": lambda p: p,
    "slice": lambda p: p[:, :],
    "view": lambda p: p.view(-1).view(p.shape),
    "expanded": lambda p: p[:1].expand(p.shape),
    "detached": lambda p: p.detach(),
    "made by a network": lambda p: p * 1,
}


def parameters():
    logits = torch.nn.Parameter(torch.randn(ROWS, CLASSES))
    tau = torch.nn.Parameter(torch.rand(ROWS, 1) + 0.5)
    return logits, tau


def weighted(y):
    return (y * torch.linspace(-1, 2, y.numel()).cos().view(y.shape)).sum()


def gradients(y, of, twice):
    """First derivatives and, where there are any, those of their weighted sum."""
    first = torch.autograd.grad(weighted(y), of, create_graph=twice, allow_unused=True)
    found = [g for g in first if g is not None]
    if twice and (smooth := [weighted(g) for g in found if g.requires_grad]):
        found += torch.autograd.grad(sum(smooth), of, allow_unused=True)
    return [g for g in found if g is not None]


def before_and_after(name, view, change, twice):
    """Gradients without a change between forward and backward, and with one."""
    state = torch.tensor([5, 0])
    logits, tau = parameters()
    detached = view == "detached"
    of = [tau] if detached else [logits, tau]
    for changed in (False, True):
        y = EVERY[name](VIEWS[view](logits), tau if detached else VIEWS[view](tau), state)
        if changed:
            for p in (logits, tau):
                change(p)
        yield gradients(y, of, twice)


@pytest.mark.parametrize("change", UNSEEN)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", EVERY)
def test_the_gradient_is_that_of_the_forward(name, view, change):
    """Of parameters, their views and what a network makes of them; second derivatives too."""
    if view == "detached" and name in (*ESTIMATORS, "gumbel_topk"):
        pytest.skip("has no gradient in tau")
    expected, actual = before_and_after(name, view, UNSEEN[change], name in OPS)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("change", SEEN)
@pytest.mark.parametrize("view", ["leaf", "expanded", "made by a network"])
@pytest.mark.parametrize("name", EVERY)
def test_what_autograd_sees_is_right_or_refused(name, view, change):
    """By PyTorch's own operations, of which some of these are made."""
    results = before_and_after(name, view, SEEN[change], twice=False)
    expected = next(results)
    try:
        actual = next(results)
    except RuntimeError as error:
        message = str(error)
    else:
        message = None
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b)
    assert message is None or "modified by an inplace operation" in message


def calls_that_save(x, tau, mask, value, book):
    """By op, with the arguments that its backward reads again."""
    saved = {"logits": x, "tau": tau, "mask": mask}
    yield gumbel_ext.gumbel_softmax(x, tau, True, mask=mask), "gumbel_softmax", saved
    soft = gumbel_ext.gumbel_softmax(x, tau)
    yield soft, "gumbel_softmax", {"the sample": soft, "tau": tau}
    log = gumbel_ext.gumbel_log_softmax(x, tau)
    yield log, "gumbel_log_softmax", {"the sample": log, "tau": tau}
    yield (
        gumbel_ext.concrete_log_prob(value, x, tau),
        "concrete_log_prob",
        {"value": value, "tau": tau},  # of logits that have been moved, a copy
    )
    yield gumbel_ext.binary_concrete(x, tau), "binary_concrete", {"logits": x, "tau": tau}
    yield (
        gumbel_ext.straight_through_softmax(x, tau, mask=mask),
        "straight_through_softmax",
        saved,
    )
    yield gumbel_ext.soft_argmax(x, tau), "soft_argmax", {"logits": x, "beta": tau}
    yield (
        gumbel_ext.decoupled_gumbel_softmax(x, 0.7, tau, mask=mask),
        "decoupled_gumbel_softmax",
        {"logits": x, "tau_backward": tau, "mask": mask},
    )
    yield (
        gumbel_ext.gumbel_embedding(x, book, tau, mask=mask),
        "gumbel_embedding",
        {**saved, "weight": book},
    )
    for name in ESTIMATORS:
        yield EVERY[name](x, tau, None), name, {"logits": x}


def test_the_error_of_a_change_in_place_says_what_to_do():
    """Of logits that are no leaf, for which nothing is copied."""
    logits, tau = parameters()
    book = codebook().requires_grad_()
    mask = torch.ones(ROWS, CLASSES, dtype=torch.bool)

    def calls():
        yield from calls_that_save(logits * 1, tau * 1, mask.clone(), simplex(), book * 1)

    kinds = [(i, name) for i, (_, _, saved) in enumerate(calls()) for name in saved]
    for i, changed in kinds:
        y, op, saved = list(calls())[i]
        with torch.no_grad():
            saved[changed].copy_(saved[changed].clone())
        with pytest.raises(
            RuntimeError,
            match=f"^{op}: .*{changed}.*, which the backward reads, "
            "has been modified by an inplace operation: .* is at version .*; modify "
            r"a clone\(\) of it, or modify it after the backward$",
        ):
            weighted(y).backward()


def test_a_copy_is_of_leaves_alone():
    """And none is made where the backward does not read the logits."""
    logits, _ = parameters()

    def saved_by(call, x):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            call(x)
        return {t.data_ptr() for t in saved if t.shape == x.shape}

    for x, copied in (
        (logits, True),
        (logits.view(-1).view(logits.shape), True),
        (logits * 1, False),
    ):
        saved = saved_by(lambda x: gumbel_ext.gumbel_softmax(x, 1, True), x)
        assert len(saved) == 1
        assert (x.data_ptr() not in saved) == copied
    assert gumbel_ext.gumbel_softmax(logits).grad_fn.next_functions[0][0].variable is logits


def test_a_compiled_graph_has_no_copy():
    """Its inputs look like leaves; the graph saves them as it saves those of PyTorch's own."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def sample(x, tau):
        return gumbel_ext.gumbel_softmax(x, tau, True) + gumbel_ext.binary_concrete(x, tau)

    from torch._dynamo.backends.common import aot_autograd

    compiled = torch.compile(sample, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    compiled(*parameters()).sum().backward()
    operations = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert any("gumbel_softmax_hard_backward" in name for name in operations)
    assert not any("clone" in name for name in operations)
