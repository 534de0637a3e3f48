"""Writes the tensors that client.cpp must reproduce: python expected.py FILE."""

import sys

import torch

import gumbel_ext

SEED = 20260  # as in client.cpp


def expected():
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    base, weight = normal(7, 13, 5), normal(7, 13, 5)
    tau = 0.5 + torch.rand(7, 1, 1, generator=generator)
    mask = torch.rand(7, 13, 1, generator=generator) < 0.7
    mask[2] = False
    state = torch.tensor([-(2**62) - 3, 2**40 + 1])
    tensors = {"tau": tau, "mask": mask, "state": state}
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        name = str(dtype).removeprefix("torch.")
        logits, grad = base.to(dtype), weight.to(dtype)
        tensors |= {f"{name}.logits": logits, f"{name}.weight": grad}
        for hard in (False, True):
            for key, value in softmax(logits, grad, hard, tau, mask, state).items():
                tensors[f"{name}.{'hard' if hard else 'soft'}.{key}"] = value
        torch.manual_seed(SEED)
        tensors[f"{name}.argmax"] = gumbel_ext.gumbel_argmax(logits, 1, keepdim=True, mask=mask)
        tensors[f"{name}.noise"] = gumbel_ext.gumbel_noise((3, 11), dtype=dtype)
        tensors[f"{name}.stateless.noise"] = gumbel_ext.gumbel_noise(
            (3, 11), dtype=dtype, rng_state=state
        )
    return tensors


def softmax(logits, weight, hard, tau, mask, state):
    torch.manual_seed(SEED)
    leaf = logits.clone().requires_grad_()
    y, index = gumbel_ext.gumbel_softmax(leaf, 0.7, hard, dim=1, return_index=True)
    (y * weight).sum().backward()
    # One draw of the seed: as one argument of the op it is read back here.
    torch.manual_seed(SEED)
    used = torch.ops.gumbel_ext.gumbel_softmax(logits, 0.7, None, hard, 1, None, False, None, None)[
        2
    ]
    tensors = {"y": y.detach(), "index": index, "grad": leaf.grad, "used": used}

    leaf, learned = logits.clone().requires_grad_(), tau.clone().requires_grad_()
    y, index = gumbel_ext.gumbel_softmax(
        leaf,
        learned,
        hard,
        dim=1,
        mask=mask,
        return_index=True,
        generator=torch.Generator().manual_seed(SEED),
    )
    (y * weight).sum().backward()
    tensors |= {
        "masked.y": y.detach(),
        "masked.index": index,
        "masked.grad": leaf.grad,
        "masked.grad_tau": learned.grad,
    }

    leaf, learned = logits.clone().requires_grad_(), torch.tensor(0.7, dtype=torch.float64)
    learned = learned.expand(7, 1, 5).clone().requires_grad_()
    y = gumbel_ext.gumbel_softmax(leaf, learned, hard, dim=1, rng_state=state)
    y.backward(weight)
    tensors |= {
        "stateless.y": y.detach(),
        "stateless.grad": leaf.grad,
        # The op gives it in the dtype it computes in.
        "stateless.grad_tau": learned.grad.to(
            torch.float64 if logits.dtype == torch.float64 else torch.float32
        ),
    }
    return tensors


if __name__ == "__main__":
    torch.save(expected(), sys.argv[1])
