"""Every op has all its pieces: one that lacks a kernel, a rule or a tag fails here by name."""

import re
from pathlib import Path

import pytest
import torch

from gumbel_ext._ops import is_composite, ops
from gumbel_ext._vmap import has_rule

CSRC = Path(__file__).resolve().parents[1] / "csrc"
# Chunks of rows that are sharded over processes: called by gumbel_ext/_sharded_rows.py, below
# autograd and outside of transforms.
OF_SHARDED_ROWS = {"noise_at", "exponentiate_chunks", "dot_chunks"}


def sources(pattern):
    return "".join(path.read_text(encoding="utf-8") for path in sorted(CSRC.glob(pattern)))


def op_structs():
    """Name -> (C++ struct, its text), of every op that csrc/ops describes."""
    text = sources("ops/*.h") + sources("ops/*.cpp")
    struct = re.compile(
        r"^struct (\w+) \{\n  static constexpr const char\* schema =(.*?)^\};", re.M | re.S
    )
    return {re.search(r'"(\w+)\(', body)[1]: (name, body) for name, body in struct.findall(text)}


def implemented(folder, struct):
    """Whether a file of a device registers a function of an op's struct, or a template for it."""
    text = sources(f"{folder}/*.cpp")
    functions = re.findall(rf"(\w+)\({struct}& \w+\)", text)
    return any(f"implement<&{name}>(m)" in text for name in functions) or (
        re.search(rf"implement<&\w+<{struct}>>\(m\)", text) is not None
    )


def has_kernel(op, key):
    return torch._C._dispatch_has_kernel_for_dispatch_key(op._schema.name, key)


def missing_pieces(name, op):
    """What an op lacks, one word or two a piece."""
    arguments = {argument.name for argument in op._schema.arguments}
    draws = "generator" in arguments
    struct, description = op_structs().get(name, (None, ""))
    internal = name in OF_SHARDED_ROWS
    composite = is_composite(op)
    explicit = has_kernel(op, "CompositeExplicitAutograd")
    vmap_key = "FuncTorchVmapMode" if draws else "FuncTorchBatched"
    pieces = {
        "struct in csrc/ops": struct is not None,
        "pt2_compliant_tag": torch.Tag.pt2_compliant_tag in op.tags,
        # The tag is what compilers' list of ops to be left alone is made of.
        "nondeterministic_seeded exactly where it may draw": draws
        == (torch.Tag.nondeterministic_seeded in op.tags),
        "rng_state beside its generator": not draws
        or "rng_state" in arguments
        or name == "draw_rng_state",
        "Meta kernel": composite or has_kernel(op, "Meta"),
        "CPU kernel": composite or explicit or has_kernel(op, "CPU"),
        "CUDA kernel": composite or explicit or (struct and implemented("cuda", struct)),
        "Autograd kernel": composite or internal or has_kernel(op, "Autograd"),
        "refusal of sparse tensors": composite or has_kernel(op, "SparseCPU"),
        "autocast as its struct says": ("Autocast::kFloat32" in description)
        == has_kernel(op, "AutocastCUDA"),
        "vmap rule": internal or ((composite or has_rule(op)) and has_kernel(op, vmap_key)),
    }
    return [piece for piece, there in pieces.items() if not there]


@pytest.mark.parametrize("name", sorted(ops()))
def test_no_op_lacks_a_piece(name):
    missing = missing_pieces(name, ops()[name])
    assert not missing, f"{name} lacks: {', '.join(missing)}"


def test_what_csrc_describes_is_what_is_registered():
    assert set(op_structs()) == set(ops())


@pytest.fixture
def throw_away_op():
    """Defines an op of the package by its schema, with kernels under the keys given."""
    library = torch.library.Library("gumbel_ext", "FRAGMENT")

    def define(schema, keys=(), tags=()):
        name = library.define(schema, tags=tags)
        for key in keys:
            library.impl(name, lambda *args: args[0], key)
        return getattr(torch.ops.gumbel_ext, name).default

    yield define
    library._destroy()


KEYS = ("Meta", "CPU", "CUDA", "Autograd", "SparseCPU", "FuncTorchVmapMode")
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded)


@pytest.mark.parametrize(
    ("piece", "keys", "tags"),
    [
        ("Meta kernel", [key for key in KEYS if key != "Meta"], TAGS),
        ("CPU kernel", [key for key in KEYS if key != "CPU"], TAGS),
        ("CUDA kernel", KEYS, TAGS),
        ("Autograd kernel", [key for key in KEYS if key != "Autograd"], TAGS),
        ("refusal of sparse tensors", [key for key in KEYS if key != "SparseCPU"], TAGS),
        ("vmap rule", KEYS[:-1], TAGS),
        ("autocast as its struct says", [*KEYS, "AutocastCUDA"], TAGS),
        ("pt2_compliant_tag", KEYS, TAGS[1:]),
        ("nondeterministic_seeded exactly where it may draw", KEYS, TAGS[:1]),
        ("struct in csrc/ops", KEYS, TAGS),
    ],
)
def test_a_missing_piece_is_named(throw_away_op, piece, keys, tags):
    schema = "forgotten(Tensor logits, int dim, Generator? generator, Tensor? rng_state) -> Tensor"
    op = throw_away_op(schema, keys, tags)
    missing = missing_pieces("forgotten", op)
    assert piece in missing
    # Nothing of csrc is there for this op; all else is.
    assert set(missing) <= {piece, "struct in csrc/ops", "CUDA kernel"}
    assert "forgotten" in ops()


def test_arguments_that_the_vmap_rule_does_not_know_are_seen(throw_away_op):
    tags = (torch.Tag.pt2_compliant_tag,)
    op = throw_away_op("forgotten(Tensor logits, Tensor novel, int dim) -> Tensor", KEYS, tags)
    assert "vmap rule" in missing_pieces("forgotten", op)
