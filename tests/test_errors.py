"""Bad input gives one clear line that names the argument and the value, never a crash or NaN."""

import re
import warnings

import pytest
import torch
from oracle import default_rng_state

import gumbel_ext

INF, NAN = float("inf"), float("nan")
REFUSED = (TypeError, ValueError, IndexError)


def expect(error, *words):
    """The error, of this type, with all the words in its message and one line of text."""
    pattern = "".join(f"(?=.*{re.escape(word)})" for word in words)
    return pytest.raises(error, match=rf"\A{pattern}.*\Z")


def sampled(logits, **options):
    """Both public functions: they must refuse alike."""
    yield lambda: gumbel_ext.gumbel_softmax(logits, **options)
    yield lambda: gumbel_ext.gumbel_softmax(logits, hard=True, return_index=True, **options)
    yield lambda: gumbel_ext.gumbel_argmax(logits, **options)


def softmax_op(logits, *, tau=1.0, tau_tensor=None, dim=-1, mask=None, state=None, generator=None):
    return torch.ops.gumbel_ext.gumbel_softmax(
        logits, tau, tau_tensor, False, dim, mask, True, generator, state
    )


def argmax_op(logits, *, dim=-1, mask=None, state=None, generator=None):
    return torch.ops.gumbel_ext.gumbel_argmax(logits, dim, False, mask, generator, state)


OPS = (softmax_op, argmax_op)


# ---- logits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64], ids=str)
def test_dtype_of_logits(device, dtype):
    logits = torch.ones(3, 4, device=device).to(dtype)
    name = str(dtype).removeprefix("torch.")
    for call in sampled(logits):
        with pytest.raises(TypeError, match="logits") as caught:
            call()
        message = str(caught.value).lower()
        # C++ calls int64 Long, int8 Char, complex64 ComplexFloat.
        spelled = {"int64": "long", "int8": "char", "complex64": "complexfloat"}
        assert name in message or spelled.get(name, name) in message
        assert "\n" not in message
    for op in OPS:
        with pytest.raises(TypeError, match="logits"):
            op(logits)


@pytest.mark.parametrize("logits", [[1.0, 2.0], None, 3.0, "text"], ids=repr)
def test_logits_that_are_no_tensor(logits):
    for call in sampled(logits):
        with expect(TypeError, "logits"):
            call()


@pytest.mark.parametrize("layout", ["sparse", "quantized"])
def test_logits_of_other_layouts(device, layout):
    """Refused one way or another, never read as if they were strided."""
    if layout == "sparse":
        logits = torch.eye(3).to_sparse()
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logits = torch.quantize_per_tensor(torch.ones(3, 3), 0.1, 0, torch.quint8)
    for call in sampled(logits.to(device)):
        with pytest.raises((*REFUSED, RuntimeError)):
            call()


# ---- dim ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "dim"), [((3, 4), 2), ((3, 4), -3), ((3,), 1), ((), 1)], ids=str)
def test_dim_out_of_range(device, shape, dim):
    logits = torch.zeros(shape, device=device)
    for call in sampled(logits, dim=dim):
        with expect(IndexError, "dim", str(dim)):
            call()
    for op in OPS:
        with pytest.raises(IndexError, match=str(dim)):
            op(logits, dim=dim)


@pytest.mark.parametrize("dim", [1.5, "1", None, (0, 1)], ids=repr)
def test_dim_that_is_no_int(device, dim):
    for call in sampled(torch.zeros(3, 4, device=device), dim=dim):
        with expect(TypeError, "dim"):
            call()


# ---- tau ----------------------------------------------------------------------------------------

BAD_TAUS = {
    "zero": (0.0, "0"),
    "negative": (-1.5, "-1.5"),
    "nan": (NAN, "nan"),
    "inf": (INF, "inf"),
}


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize(("tau", "spelled"), BAD_TAUS.values(), ids=BAD_TAUS)
def test_tau_out_of_range(device, tau, spelled, hard):
    logits = torch.zeros(3, 4, device=device)
    with expect(ValueError, "tau", spelled):
        gumbel_ext.gumbel_softmax(logits, tau, hard)
    with pytest.raises(ValueError, match="tau"):
        softmax_op(logits, tau=tau)


@pytest.mark.cpu_only(reason="a tau tensor on the GPU is not read: its bad rows are NaN")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize(("tau", "spelled"), BAD_TAUS.values(), ids=BAD_TAUS)
def test_tau_tensor_out_of_range(tau, spelled, dtype):
    """CPU tensors are read; one bad value among good ones is found and named."""
    logits = torch.zeros(3, 4)
    one_of_many = torch.ones(3, 1, dtype=dtype)
    one_of_many[1] = tau
    for given in (torch.tensor(tau, dtype=dtype), one_of_many):
        with expect(ValueError, "tau", spelled):
            gumbel_ext.gumbel_softmax(logits, given)
        with pytest.raises(ValueError, match="tau"):
            softmax_op(logits, tau_tensor=given)
        with pytest.raises(ValueError, match="tau"):
            gumbel_ext.gumbel_softmax(logits.clone().requires_grad_(), given.requires_grad_())


@pytest.mark.parametrize(
    ("tau_shape", "dim"),
    [((4,), -1), ((3, 4), -1), ((2, 1), -1), ((3, 1), 0), ((1, 3, 1), -1), ((5,), -1)],
    ids=str,
)
def test_tau_that_does_not_broadcast(device, tau_shape, dim):
    """A value for each class would be no temperature of a softmax."""
    logits = torch.zeros(3, 4, device=device)
    tau = torch.ones(tau_shape, device=device)
    with expect(ValueError, "tau", str(list(tau_shape))):
        gumbel_ext.gumbel_softmax(logits, tau, dim=dim)
    with pytest.raises(ValueError, match="tau"):
        softmax_op(logits, tau_tensor=tau, dim=dim)


@pytest.mark.parametrize("tau", ["1", None, [1.0], 1j, torch.tensor(1j)], ids=repr)
def test_tau_that_is_no_number(device, tau):
    with expect(TypeError, "tau"):
        gumbel_ext.gumbel_softmax(torch.zeros(3, 4, device=device), tau)


def test_tau_may_be_an_int(device, state):
    logits = torch.zeros(3, 4, device=device)
    y = gumbel_ext.gumbel_softmax(logits, 2, rng_state=state)
    assert torch.equal(y, gumbel_ext.gumbel_softmax(logits, 2.0, rng_state=state))


def test_state_is_not_drawn_for_a_refused_call(device):
    logits = torch.zeros(3, 4, device=device)
    before = default_rng_state(device)
    with pytest.raises(ValueError, match="tau"):
        gumbel_ext.gumbel_softmax(logits, -1.0)
    with pytest.raises(IndexError):
        gumbel_ext.gumbel_argmax(logits, 5)
    assert torch.equal(default_rng_state(device), before)


# ---- mask ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8], ids=str)
def test_dtype_of_mask(device, dtype):
    logits = torch.zeros(3, 4, device=device)
    mask = torch.ones(3, 4, dtype=dtype, device=device)
    for call in sampled(logits, mask=mask):
        with expect(TypeError, "mask"):
            call()
    for op in OPS:
        with pytest.raises(TypeError, match="mask"):
            op(logits, mask=mask)


@pytest.mark.parametrize("shape", [(3,), (2, 4), (4, 3), (1, 3, 4), (2, 3, 4), (0,)], ids=str)
def test_mask_that_does_not_broadcast(device, shape):
    logits = torch.zeros(3, 4, device=device)
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    for call in sampled(logits, mask=mask):
        with expect(ValueError, "mask", str(list(shape))):
            call()
    for op in OPS:
        with pytest.raises(ValueError, match="mask"):
            op(logits, mask=mask)


@pytest.mark.parametrize("mask", [True, [True] * 4, "text"], ids=repr)
def test_mask_that_is_no_tensor(device, mask):
    for call in sampled(torch.zeros(3, 4, device=device), mask=mask):
        with expect(TypeError, "mask"):
            call()


# ---- randomness ---------------------------------------------------------------------------------

BAD_STATES = {
    "float": (torch.zeros(2), TypeError),
    "int32": (torch.zeros(2, dtype=torch.int32), TypeError),
    "too_long": (torch.zeros(3, dtype=torch.int64), ValueError),
    "scalar": (torch.tensor(1), ValueError),
    "matrix": (torch.zeros(1, 2, dtype=torch.int64), ValueError),
    "empty": (torch.zeros(0, dtype=torch.int64), ValueError),
}


@pytest.mark.parametrize(("bad", "error"), BAD_STATES.values(), ids=BAD_STATES)
def test_bad_rng_state(device, bad, error):
    logits = torch.zeros(3, 4, device=device)
    bad = bad.to(device)
    for call in (
        *sampled(logits, rng_state=bad),
        lambda: gumbel_ext.gumbel_noise(3, device=device, rng_state=bad),
    ):
        with expect(error, "rng_state"):
            call()
    for op in OPS:
        with pytest.raises(error, match="rng_state"):
            op(logits, state=bad)
    with pytest.raises(error, match="rng_state"):
        torch.ops.gumbel_ext.gumbel_noise(logits, [3], None, bad)


@pytest.mark.parametrize("bad", [[1, 2], (1, 2), 7, "text"], ids=repr)
def test_rng_state_that_is_no_tensor(device, bad):
    for call in (
        *sampled(torch.zeros(3, 4, device=device), rng_state=bad),
        lambda: gumbel_ext.gumbel_noise(3, device=device, rng_state=bad),
    ):
        with expect(TypeError, "rng_state"):
            call()


@pytest.mark.parametrize("bad", [7, "cpu", torch.zeros(2, dtype=torch.int64)], ids=repr)
def test_generator_of_another_type(device, bad):
    for call in (
        *sampled(torch.zeros(3, 4, device=device), generator=bad),
        lambda: gumbel_ext.gumbel_noise(3, device=device, generator=bad),
    ):
        with expect(TypeError, "generator"):
            call()


def test_generator_and_rng_state_together(device, state):
    both = {"generator": torch.Generator(device), "rng_state": state}
    for call in (
        *sampled(torch.zeros(3, 4, device=device), **both),
        lambda: gumbel_ext.gumbel_noise(3, device=device, **both),
    ):
        with expect(ValueError, "generator", "rng_state"):
            call()


# ---- devices ------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["mask", "rng_state", "tau"])
def test_mixed_devices(device, argument):
    other = {
        "mask": torch.ones(3, 4, dtype=torch.bool, device="meta"),
        "rng_state": torch.zeros(2, dtype=torch.int64, device="meta"),
        "tau": torch.ones(3, 1, device="meta"),
    }[argument]
    logits = torch.zeros(3, 4, device=device)
    with expect(REFUSED, argument):
        gumbel_ext.gumbel_softmax(logits, **{argument: other})
    if argument != "tau":
        with expect(REFUSED, argument):
            gumbel_ext.gumbel_argmax(logits, **{argument: other})


# ---- the drop-in signature ----------------------------------------------------------------------


def test_eps_is_accepted_and_ignored(device, state):
    """As in PyTorch, which warns, too."""
    logits = torch.zeros(3, 4, device=device)
    expected = gumbel_ext.gumbel_softmax(logits, rng_state=state)
    with pytest.warns(UserWarning, match="eps"):
        assert torch.equal(gumbel_ext.gumbel_softmax(logits, eps=1e-5, rng_state=state), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gumbel_ext.gumbel_softmax(logits, eps=1e-10)


def test_new_options_are_keyword_only():
    with pytest.raises(TypeError):
        gumbel_ext.gumbel_softmax(torch.zeros(3, 4), 1, False, 1e-10, -1, None)
    with pytest.raises(TypeError):
        gumbel_ext.gumbel_argmax(torch.zeros(3, 4), -1, False, None)


# ---- the backward ops, called by hand -----------------------------------------------------------


def test_backward_ops_check_what_they_are_given(device):
    y = torch.softmax(torch.randn(3, 4), -1).to(device)
    grad = torch.randn(3, 4).to(device)
    backward = torch.ops.gumbel_ext.gumbel_softmax_backward
    index = y.argmax(-1)
    backward(grad, y, index, 0.5, None, -1, True)
    for bad in (
        (grad[:2], y, index, 0.5, None, -1, False),
        (grad, y, index[:2], 0.5, None, -1, False),
        (grad, y, index.int(), 0.5, None, -1, False),
        (grad, y, index, 0.5, None, 2, False),
        (grad.to_sparse(), y, index, 0.5, None, -1, False),
    ):
        with pytest.raises((*REFUSED, RuntimeError)):
            backward(*bad)


@pytest.mark.cpu_only(reason="an index on the GPU is not read before its kernel runs")
def test_backward_ops_do_not_read_outside_the_row():
    y = torch.softmax(torch.randn(3, 4), -1)
    grad = torch.randn(3, 4)
    backward = torch.ops.gumbel_ext.gumbel_softmax_backward
    for value in (4, 1 << 40, -5):
        outside = torch.full((3,), value)
        try:
            result = backward(grad, y, outside, 0.5, None, -1, False)[0]
        except (*REFUSED, RuntimeError):
            continue
        assert result.shape == y.shape


def test_hard_backward_checks_what_it_is_given(device, state):
    logits, grad = torch.randn(2, 3, 4).to(device)
    backward = torch.ops.gumbel_ext.gumbel_softmax_hard_backward
    index = logits.argmax(-1)
    backward(grad, logits, index, 0.5, None, -1, None, state, True)
    for bad in (
        (grad[:2], logits, index, 0.5, None, -1, None, state, False),
        (grad, logits, index[:2], 0.5, None, -1, None, state, False),
        (grad, logits, index, 0.5, None, 5, None, state, False),
        (grad, logits, index, 0.5, None, -1, torch.ones(3, device=device), state, False),
        (grad, logits, index, 0.5, None, -1, None, state[:1], False),
        (grad, logits, index, 0.5, torch.ones(4, device=device), -1, None, state, False),
    ):
        with pytest.raises((*REFUSED, RuntimeError)):
            backward(*bad)
