"""Philox against its published vectors, the logarithm against float64, and the noise against its distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from chts_kernels import rng
from chts_kernels.rng import Purpose

# Random123, tests/kat_vectors, "philox4x32 10": counter, key, expected words.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def bits(rows: int = 64, columns: int = 64, seed: int = 0, layer: int = 0, step: int = 0, purpose=Purpose.REMOVE):
    return rng.random_bits(rows, columns, seed=seed, layer=layer, step=step, purpose=purpose)


def chi_square_limit(freedom: int, deviations: float = 4.0) -> float:
    return freedom + deviations * math.sqrt(2 * freedom)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, words) -> None:
    assert tuple(int(w) for w in rng.philox(counter, key)) == words
    as_tensors = tuple(torch.tensor([c, c]) for c in counter)
    assert all(w.tolist() == [expected] * 2 for w, expected in zip(rng.philox(as_tensors, key), words, strict=True))


def philox_python(counter: list[int], key: list[int]) -> list[int]:
    """The ten rounds on Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, p0 >> 32 ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_bits_follow_the_documented_counter() -> None:
    seed, layer, step, rows, columns = 0x1234_5678_9ABC_DEF0, 7, 0xFFFFFFFF, 6, 20
    got = bits(rows, columns, seed, layer, step, Purpose.REGROW)
    assert got.dtype == torch.int64
    for row in range(rows):
        for column in range(columns):
            group, word = divmod(row * columns + column, 4)
            expected = philox_python([group, layer, step, 1], [seed & 0xFFFFFFFF, seed >> 32])[word]
            assert int(got[row, column]) == expected


def test_purposes_never_change_their_number() -> None:
    assert [(p.name, p.value) for p in Purpose] == [("REMOVE", 0), ("REGROW", 1), ("INIT", 2), ("MVUE", 3), ("ROUND", 4)]


def test_element_noise_does_not_depend_on_the_number_of_rows() -> None:
    assert torch.equal(bits(8, 32), bits(64, 32)[:8])


@pytest.mark.parametrize("change", ({"seed": 1}, {"seed": 1 << 32}, {"layer": 1}, {"step": 1}, {"purpose": Purpose.INIT}))
def test_every_index_changes_the_bits(change: dict) -> None:
    assert (bits(32, 32) == bits(32, 32, **change)).sum() <= 1
    assert torch.equal(bits(32, 32, **change), bits(32, 32, **change))


def test_largest_arguments_are_accepted() -> None:
    bits(4, 4, seed=(1 << 63) - 1, layer=(1 << 32) - 1, step=(1 << 32) - 1)
    assert bits(0, 4).shape == (0, 4)


def test_bits_are_uniform() -> None:
    """Chi-square over 256 cells of each of the four bytes; every one of the 32 bits is set half of the time."""
    draws = bits(1024, 1024).flatten()
    for shift in (0, 8, 16, 24):
        counts = torch.bincount(draws >> shift & 0xFF, minlength=256).double()
        expected = draws.numel() / 256
        assert ((counts - expected) ** 2 / expected).sum() < chi_square_limit(255)
    for bit in range(32):
        share = (draws >> bit & 1).double().mean().item()
        assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(draws.numel())


@pytest.mark.parametrize("pair", ("columns", "rows", "steps", "layers", "seeds", "purposes"))
def test_neighbours_are_independent(pair: str) -> None:
    """Chi-square of the 16 x 16 joint cells of the top bits of two draws that differ in one index."""
    first = bits(512, 512)
    second = {
        "columns": lambda: first.roll(1, 1),
        "rows": lambda: first.roll(1, 0),
        "steps": lambda: bits(512, 512, step=1),
        "layers": lambda: bits(512, 512, layer=1),
        "seeds": lambda: bits(512, 512, seed=1),
        "purposes": lambda: bits(512, 512, purpose=Purpose.REGROW),
    }[pair]()
    counts = torch.bincount(((first >> 28) * 16 + (second >> 28)).flatten(), minlength=256).double()
    expected = first.numel() / 256
    assert ((counts - expected) ** 2 / expected).sum() < chi_square_limit(255)


def test_uniforms_are_exact_and_in_range() -> None:
    edge = torch.tensor([0, 0xFF, 0x100, 0x1FF, 0x200, 0xFFFFFFFF])
    assert rng.uniform(edge).tolist() == [0, 0, 2**-24, 2**-24, 2**-23, 1 - 2**-24]
    assert rng.open_uniform(edge).tolist() == [2**-24, 2**-24, 2**-24, 2**-24, 3 * 2**-24, 1 - 2**-24]
    assert rng.uniform(edge).dtype == rng.open_uniform(edge).dtype == torch.float32
    draws = bits(256, 256)
    assert abs(rng.uniform(draws).mean() - 0.5) < 5 / math.sqrt(12 * draws.numel())


def log_test_points() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    every_exponent = torch.randint(1, 0x7F800000, (200_000,), generator=generator, dtype=torch.int32)
    subnormal = torch.randint(1, 0x00800000, (20_000,), generator=generator, dtype=torch.int32)
    near_one = 0x3F800000 + torch.arange(-20_000, 20_000, dtype=torch.int32)
    split = 0x3F3504F3 + torch.arange(-1000, 1000, dtype=torch.int32)
    edges = torch.tensor([1, 0x007FFFFF, 0x00800000, 0x7F7FFFFF], dtype=torch.int32)
    return torch.cat([every_exponent, subnormal, near_one, split, edges]).view(torch.float32)


def test_log_is_within_2_ulp() -> None:
    x = log_test_points().numpy()
    exact = np.log(x.astype(np.float64))
    ulp = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    error = np.abs(rng.log_float32(torch.from_numpy(x)).numpy().astype(np.float64) - exact) / ulp
    assert error.max() <= 2.0, f"{error.max()} ulp at {x[error.argmax()]!r}"


def test_log_of_the_uniforms_that_noise_takes() -> None:
    """-ln U is positive over all 2**23 values of the open uniform, so that its own logarithm exists."""
    u = rng.open_uniform(torch.arange(0, 1 << 32, 1 << 9))
    assert (-rng.log_float32(u) > 0).all()
    assert rng.gumbel(torch.arange(0, 1 << 32, 1 << 12)).isfinite().all()


def test_log_of_special_values() -> None:
    x = torch.tensor([0.0, 1.0, torch.inf, torch.nan])
    assert rng.log_float32(x).tolist() == [-torch.inf, 0.0, torch.inf, torch.inf]


def test_log_rises_monotonically_enough_to_rank() -> None:
    x = log_test_points().sort().values
    y = rng.log_float32(x).double()
    drop = (y.cummax(0).values - y) / y.abs().clamp(min=2.0**-126)
    assert drop.max() < 2 * 2**-23  # rounding may swap neighbours, nothing more


def test_gumbel_has_its_distribution() -> None:
    """P(G < g) = exp(-exp(-g)): chi-square over 64 equally likely cells, then mean and variance."""
    g = rng.gumbel(bits(512, 512)).double()
    cells = (torch.exp(-torch.exp(-g)) * 64).long().clamp(max=63)
    counts = torch.bincount(cells.flatten(), minlength=64).double()
    expected = g.numel() / 64
    assert ((counts - expected) ** 2 / expected).sum() < chi_square_limit(63)
    assert abs(g.mean() - np.euler_gamma) < 5 * math.pi / math.sqrt(6 * g.numel())
    assert abs(g.var() - math.pi**2 / 6) < 0.03


@pytest.mark.parametrize("temperature", (1.0, 3.0, 9.0))
def test_frechet_noise_of_shape_t(temperature: float) -> None:
    """exp(G / T) = (-ln U)**(-1/T): P(X < x) = exp(-x**-T)."""
    x = torch.exp(rng.gumbel(bits(256, 256)).double() / temperature)
    cells = (torch.exp(-(x**-temperature)) * 32).long().clamp(max=31)
    counts = torch.bincount(cells.flatten(), minlength=32).double()
    assert ((counts - x.numel() / 32) ** 2 / (x.numel() / 32)).sum() < chi_square_limit(31)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": 6}, r"columns: must be a multiple of 4, got 6"),
        ({"rows": 1 << 20, "columns": 1 << 15}, r"rows \* columns: must be at most 2\*\*34, got 34359738368"),
        ({"seed": -1}, r"seed: must be an integer in \[0, 2\*\*63\), got -1"),
        ({"seed": 1 << 63}, r"seed: must be an integer in \[0, 2\*\*63\), got 9223372036854775808"),
        ({"seed": 1.5}, r"seed: must be an integer in \[0, 2\*\*63\), got 1.5"),
        ({"layer": 1 << 32}, r"layer: must be an integer in \[0, 2\*\*32\), got 4294967296"),
        ({"layer": -1}, r"layer: must be an integer in \[0, 2\*\*32\), got -1"),
        ({"step": 1 << 32}, r"step: must be an integer in \[0, 2\*\*32\), got 4294967296"),
        ({"step": "3"}, r"step: must be an integer in \[0, 2\*\*32\), got '3'"),
    ],
)  # fmt: skip
def test_argument_errors(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bits(**{"rows": 4, "columns": 4, **change})
