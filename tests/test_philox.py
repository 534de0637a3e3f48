"""The generator is Philox4x32-10, and word (seed, offset, position) is the contract's."""

import pathlib
import random
import shutil
import subprocess

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import OFFSET, SEED, as_int64, rng_state
from torch.utils import cpp_extension

import gumbel_ext
from gumbel_ext import _C, _reference

WORD = 0xFFFFFFFF

# Random123 1.14, kat_vectors: counter, key, result of philox4x32 with 10 rounds.
KNOWN_ANSWERS = {
    "zeros": (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    "ones": (
        (WORD, WORD, WORD, WORD),
        (WORD, WORD),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    "digits_of_pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


def philox_of_the_paper(counter, key):
    """Python's integers do not overflow, so this is the paper's text and nothing else."""
    a, b, c, d = counter
    k, m = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * a, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c, 1 << 32)
        a, b, c, d = high1 ^ b ^ k, low1, high0 ^ d ^ m, low0
        k, m = (k + 0x9E3779B9) & WORD, (m + 0xBB67AE85) & WORD
    return a, b, c, d


def block_of_the_contract(seed, offset, block, k):
    offset = (offset + k) % (1 << 64)
    return philox_of_the_paper(
        (offset & WORD, offset >> 32, block & WORD, block >> 32), (seed & WORD, seed >> 32)
    )


def words_of_the_contract(seed, offset, position):
    return tuple(
        block_of_the_contract(seed, offset, position >> 2, k)[position & 3] for k in (0, 1)
    )


def reference_philox(counter, key):
    words = _reference.philox4x32_10(
        tuple(torch.tensor(word) for word in counter), tuple(torch.tensor(word) for word in key)
    )
    return [int(word) for word in words]


GENERATORS = {"compiled": _C.philox4x32_10, "reference": reference_philox}


@pytest.mark.parametrize("case", KNOWN_ANSWERS)
@pytest.mark.parametrize("generator", GENERATORS)
def test_known_answers(generator, case):
    counter, key, expected = KNOWN_ANSWERS[case]
    assert list(GENERATORS[generator](list(counter), list(key))) == list(expected)
    assert philox_of_the_paper(counter, key) == expected


word = st.integers(0, WORD) | st.sampled_from([0, 1, 0xFFFF, 0x10000, 1 << 31, WORD - 1, WORD])


@given(counter=st.tuples(word, word, word, word), key=st.tuples(word, word))
def test_equals_the_paper(counter, key):
    expected = list(philox_of_the_paper(counter, key))
    for philox in GENERATORS.values():
        assert list(philox(list(counter), list(key))) == expected


def random_64_bits(source):
    return source.choice(
        [source.getrandbits(64), source.getrandbits(32), 0, (1 << 64) - 1, WORD, 1 << 63]
    )


@pytest.mark.cpu_only(reason="compiled for the host")
def test_blocks_equal_at_philox(tmp_path: pathlib.Path):
    """``block(k) == at::Philox4_32(seed, position >> 2, offset + k)``, PyTorch's own generator."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    program = tmp_path / "philox.cpp"
    program.write_text(
        """
        #include <ATen/core/PhiloxRNGEngine.h>
        #include <iostream>
        int main() {
          std::uint64_t seed, block, offset;
          while (std::cin >> seed >> block >> offset) {
            at::Philox4_32 engine(seed, block, offset);
            for (int i = 0; i < 4; ++i) std::cout << engine() << ' ';
          }
        }
        """
    )
    binary = tmp_path / "philox"
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    subprocess.run([compiler, "-std=c++20", *includes, program, "-o", binary], check=True)

    source = random.Random(1)
    cases = [
        # at::Philox4_32 adds its offset with a carry into the block number, which the contract
        # does not do: offsets stay below the wrap here.
        (random_64_bits(source), random_64_bits(source), random_64_bits(source) >> 1)
        for _ in range(200)
    ]
    answer = subprocess.run(
        [binary],
        input="\n".join(f"{seed} {block} {offset + 1}" for seed, block, offset in cases),
        capture_output=True,
        check=True,
        text=True,
    )
    expected = torch.tensor([int(word) for word in answer.stdout.split()]).reshape(-1, 4)
    actual = [
        torch.stack(
            _reference.random_block(torch.tensor(as_int64(block)), rng_state(seed, offset), k=1)
        )
        for seed, block, offset in cases
    ]
    assert torch.equal(torch.stack(actual), expected)
    assert expected.tolist() == [
        list(block_of_the_contract(seed, offset, block, 1)) for seed, block, offset in cases
    ]


def test_reference_words():
    source = random.Random(2)
    for _ in range(200):
        seed, offset, position = (random_64_bits(source) for _ in range(3))
        hi, lo = _reference.random_words(torch.tensor(as_int64(position)), rng_state(seed, offset))
        assert (int(hi), int(lo)) == words_of_the_contract(seed, offset, position)


SEEDS = {
    "zero": 0,
    "one": 1,
    "low_word": WORD,
    "high_word": 1 << 32,
    "negative": (1 << 63) + 12345,
    "largest": (1 << 64) - 1,
}
OFFSETS = {
    "zero": 0,
    "low_word_carries": WORD,
    "high_word": 5 << 32,
    "sign_changes": (1 << 63) - 1,
    "wraps": (1 << 64) - 1,
}


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("seed", SEEDS)
def test_noise_is_that_of_the_contract(device, seed, offset):
    """Through the op: float64 noise tells every word apart, so equal noise means equal words."""
    seed, offset = SEEDS[seed], OFFSETS[offset]
    words = [words_of_the_contract(seed, offset, position) for position in range(67)]
    expected = _reference.gumbel(*torch.tensor(words).T)
    actual = gumbel_ext.gumbel_noise(
        67, dtype=torch.float64, device=device, rng_state=rng_state(seed, offset, device)
    )
    torch.testing.assert_close(actual.cpu(), expected, rtol=2e-15, atol=2e-15)


def test_positions_shift_the_reference():
    state = rng_state()
    whole = _reference.gumbel_noise([64], state)
    for base in range(9):
        assert torch.equal(
            _reference.gumbel_noise([5, 4], state, [base, 4, 1]).flatten(), whole[base:][:20]
        )
    far = (1 << 34) - 3
    hi, lo = torch.tensor([words_of_the_contract(SEED, OFFSET, far + i) for i in range(12)]).T
    assert torch.equal(
        _reference.gumbel_noise([3, 4], state, [far, 4, 1]).flatten(), _reference.gumbel(hi, lo)
    )


@pytest.mark.slow
@pytest.mark.cpu_only(reason="a row on CUDA has at most 2^31 - 17 classes")
def test_positions_past_the_low_counter_word(device):
    """Position 2^34 is block 2^32, where the third counter word carries into the fourth."""
    columns = (1 << 33) + 1
    logits = torch.zeros((), dtype=torch.bfloat16, device=device).expand(2, columns)
    index = gumbel_ext.gumbel_argmax(logits, rng_state=rng_state(device=device)).cpu()
    around = 1 << 15
    for row in (0, 1):
        winner = row * columns + int(index[row])
        noise = _reference.gumbel_noise([2 * around], rng_state(), [winner - around, 1])
        assert noise[around] == noise.max()
        assert noise[around] > 18  # the largest of 2^33 is 22.9 + Gumbel(0, 1)
