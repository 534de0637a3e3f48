"""A call of every kernel of csrc/cuda at a size that fills a GPU, for ncu; and ncu's answer read.

ncu ... --csv python benchmarks/gpu_profile.py > ncu.csv
python benchmarks/gpu_profile.py --table ncu.csv    a line a kernel: time, and what is busy
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Iterator
from pathlib import Path

# In this order, by ncu's names.
WANTED = (
    "Duration",
    "DRAM Throughput",
    "L2 Cache Throughput",
    "Compute (SM) Throughput",
    "Registers Per Thread",
    "Achieved Occupancy",
)


def core(torch, gumbel_ext) -> None:
    """The regimes that most calls run in."""
    for shape in ((16384, 1024), (1024, 65536)):
        for dtype in (torch.float32, torch.bfloat16):
            logits = torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True).clone()
            grad = torch.randn_like(logits)
            for hard in (False, True):
                y = gumbel_ext.gumbel_softmax(logits, 0.5, hard)
                torch.autograd.grad(y, logits, grad)
            gumbel_ext.gumbel_argmax(logits.detach())


def relatives(torch, gumbel_ext) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(16384, 1024, device="cuda", dtype=dtype, requires_grad=True).clone()
        grad = torch.randn_like(logits)

        def train(y, inputs=(logits,), grad=grad):
            torch.autograd.grad(y, inputs, grad[: y.shape[0]] if y.dim() > 1 else grad[:, 0].to(y))

        for hard in (False, True):
            train(gumbel_ext.binary_concrete(logits, 0.5, hard))
        train(gumbel_ext.gumbel_log_softmax(logits, 0.5))
        value = logits.detach().log_softmax(-1).requires_grad_()
        train(gumbel_ext.concrete_log_prob(value, logits, 0.5, log_space=True), (value, logits))
        train(gumbel_ext.straight_through_softmax(logits, 0.5))
        train(gumbel_ext.soft_argmax(logits, 0.5))
        gumbel_ext.gumbel_topk(logits.detach(), 8)
        gumbel_ext.gumbel_topk(logits.detach(), 100)
        train(gumbel_ext.zgr(logits))
        train(gumbel_ext.reinmax(logits, 0.5))
        train(gumbel_ext.gapped_straight_through(logits, 0.5))
        train(gumbel_ext.gumbel_rao(logits, 0.5, k=10))
        book = torch.randn(2, 512, 64, device="cuda", dtype=dtype, requires_grad=True)
        out = gumbel_ext.gumbel_embedding(logits, book, 0.5)
        torch.autograd.grad(out, (logits, book), torch.ones_like(out))


def other_regimes(torch, gumbel_ext) -> None:
    """Classes that are not adjacent, one row, short rows, noise alone."""
    for shape, dim in (((64, 1024, 256), 1), ((1, 1 << 22), -1), ((1 << 20, 10), -1)):
        logits = torch.randn(shape, device="cuda", requires_grad=True).clone()
        grad = torch.randn_like(logits)
        for hard in (False, True):
            y = gumbel_ext.gumbel_softmax(logits, 0.5, hard, dim=dim)
            torch.autograd.grad(y, logits, grad)
        gumbel_ext.gumbel_argmax(logits.detach(), dim)
    gumbel_ext.gumbel_noise(1 << 24, device="cuda")
    gumbel_ext.logistic_noise(1 << 24, device="cuda")


def run() -> None:
    # Here, so that the table is written where there is no torch.
    import torch

    import gumbel_ext

    for part in (core, relatives, other_regimes):
        part(torch, gumbel_ext)
        torch.cuda.synchronize()


def short(name: str) -> str:
    """A kernel's name without namespaces and arguments."""
    name = re.sub(r"gumbel_ext::|cuda_device::|\((un)?(signed )?(int|char)\)", "", name)
    return name.split("(")[0].removeprefix("void ")


def table(path: Path) -> Iterator[str]:
    lines = [line for line in path.read_text().splitlines() if line.startswith('"')]
    kernels: dict[tuple[str, str], dict[str, str]] = {}
    for row in csv.DictReader(lines):
        if row.get("Metric Name") in WANTED:
            key = row["ID"], short(row["Kernel Name"])
            value = f"{row['Metric Value']} {row['Metric Unit']}".strip()
            kernels.setdefault(key, {})[row["Metric Name"]] = value
    for (_, name), found in kernels.items():
        yield f"{name[:58]:58} " + ", ".join(f"{k} {found[k]}" for k in WANTED if k in found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=Path, metavar="CSV", help="what ncu --csv wrote")
    arguments = parser.parse_args()
    if arguments.table is None:
        run()
        return 0
    found = list(table(arguments.table))
    print(*found, sep="\n")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
