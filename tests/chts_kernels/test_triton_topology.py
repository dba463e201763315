"""The Triton kernels of the topology update against the references: on a GPU, and on the CPU by Triton's interpreter.

Where there is no GPU the tests below run in a child process with TRITON_INTERPRET=1, which Triton reads when it is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from chts_kernels import SparseWeight, carry_over_, evolve, evolve_many, pattern_table, regrow, remove, rng, score
from chts_kernels.evolve import evolution_stats
from chts_kernels.ops._batch import interpreted
from chts_kernels.ops.carry_over import reference as carry_over_reference
from chts_kernels.ops.prune.reference import blocks
from chts_kernels.ops.regrow import reference as regrow_reference
from chts_kernels.ops.remove import reference as remove_reference
from chts_kernels.ops.score import reference as score_reference
from chts_kernels.testing import assert_bitwise_equal, random_weight

NOISE = {"seed": (3 << 40) + 5, "layer": 3, "step": 700}
BOTH = pytest.mark.parametrize("n", (1, 2))
GPU_SHAPES = [(4, 4), (12, 20), (512, 512), (1376, 512), (2048, 768)]
CPU_SHAPES = [(12, 20), (28, 132)]
"""The interpreter is slow; the second shape takes more than one tile."""
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # the interpreter takes ln 0 as numpy does


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and not interpreted():
        pytest.skip("runs in the child process of test_on_the_interpreter")
    return request.param


@pytest.fixture(scope="module", autouse=True)
def _compiled_side_by_side() -> None:
    """What the tests below launch on a GPU, compiled on several threads: one by one it would take most of their time."""
    if not torch.cuda.is_available() or interpreted():
        return
    from chts_kernels import evolve_triton
    from chts_kernels.ops._batch import compile_all, recording
    from chts_kernels.ops.score.multiply import hopper
    from chts_kernels.ops.score.triton_score import score_many

    with recording() as wanted:
        for n in (1, 2):
            weights = [random_weight(8, 8, n, dtype, device="cuda") for dtype in (torch.float32, torch.bfloat16)]
            survivors = torch.zeros(2, 2, dtype=torch.int32, device="cuda")
            for w in weights:
                for mode in ("soft", "hard"):
                    remove(w.values, w.ids, n, mode=mode, impl="triton")
            for config in ("128x256", "256x128", "128x128", "triton", *(("sparse",) if hopper(torch.device("cuda")) else ())):
                for digits in (1, 2):
                    score_many(survivors[None], digits=digits, config=config)
            for mode in ("soft", "greedy", "random"):
                for dtype in (torch.float32, torch.float64):
                    regrow(torch.zeros(8, 8, dtype=dtype, device="cuda"), survivors, n, mode=mode, impl="triton")
            for removal, regrowth in (("soft", "soft"), ("hard", "greedy"), ("soft", "random")):
                one = weights[:1], [0], [[weights[0].values, weights[1].values]]
                evolve_triton._launch(*one, 0.1, 1.0, removal, regrowth, 0, 0, True, None)
                evolve_triton._launch(*one, 0.1, 1.0, removal, regrowth, 0, 0, False, None)
    compile_all(wanted)


def shapes(device: str) -> list[tuple[int, int]]:
    return GPU_SHAPES if device == "cuda" else CPU_SHAPES


def skip_some(n: int, device: str) -> None:
    if device == "cpu" and n == 1:
        pytest.skip("the interpreter is slow, and n = 1 has nothing of its own here")


def clone(w: SparseWeight) -> SparseWeight:
    return SparseWeight(w.ids.clone(), w.values.clone(), w.n)


def survivors_of(w: SparseWeight, zeta: float = 0.1) -> torch.Tensor:
    return remove(w.values, w.ids, w.n, zeta=zeta, temperature=2.0, impl="reference", **NOISE)


@pytest.mark.timeout(900)
@pytest.mark.skipif(interpreted(), reason="this is the child process")
def test_on_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not gpu", "-p", "no:cacheprovider", __file__, "-k"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    children = [  # about halves of the time
        subprocess.Popen([*command, part], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for part in ("cpu-1", "not cpu-1")
    ]
    try:
        outputs = [child.communicate()[0] for child in children]
    finally:
        for child in children:
            child.kill()
    for child, output in zip(children, outputs, strict=True):
        assert child.returncode == 0 and " passed" in output, output[-6000:]


@BOTH
def test_noise_has_the_reference_bits(n: int, device: str) -> None:
    """Removal at a low temperature ranks by the noise: equal survivors at every zeta mean equal order of the noise."""
    w = random_weight(32, 48, n, device=device)
    for zeta in (0.01, 0.2, 0.5, 0.99) if device == "cuda" else (0.4,):
        arguments = (w.values, w.ids, n, zeta, 1e-3, "soft", (1 << 63) - 1, (1 << 32) - 1, (1 << 32) - 2)
        seed = dict(zip(("seed", "layer", "step"), arguments[-3:], strict=True))
        got = remove(w.values, w.ids, n, zeta=zeta, temperature=1e-3, impl="triton", **seed)
        assert torch.equal(got, remove_reference.remove(*arguments))


@pytest.mark.parametrize("kind", ("normal", "ties", "zeros", "tiny", "diverged"))
@pytest.mark.parametrize("mode", ("soft", "hard"))
@BOTH
def test_remove_equals_the_reference(n: int, mode: str, kind: str, device: str) -> None:
    for rows, columns in shapes(device):
        for dtype in (torch.float32, torch.bfloat16):
            w = random_weight(rows, columns, n, dtype, magnitude="integer" if kind == "ties" else "normal", device=device)
            if kind == "zeros":
                w.values[::2] = 0
                w.values[:, ::3] = -0.0
            elif kind == "tiny":
                w.values.mul_(1e-36)
            elif kind == "diverged":
                w.values[::5], w.values[1::7], w.values[2::3] = torch.nan, torch.inf, -torch.inf
            for zeta in (0.0, 0.1, 0.6, 1.0) if device == "cuda" else (0.6 if kind == "diverged" else 0.3,):
                got = remove(w.values, w.ids, n, zeta=zeta, temperature=2.5, mode=mode, impl="triton", **NOISE)
                want = remove_reference.remove(w.values, w.ids, n, zeta, 2.5, mode, *NOISE.values())
                assert torch.equal(got, want), (rows, columns, dtype, zeta)


@pytest.mark.gpu
@pytest.mark.parametrize("size, n", [(512, 1), (512, 2), (2048, 1), (2048, 2), (4096, 1), (4096, 2)])
def test_the_range_of_random_survivors_is_known_beforehand(size: int, n: int) -> None:
    """Else every update quantises twice, as it did above 2048 where rows of one block fell out of the range."""
    from chts_kernels.ops.score.triton_score import ranges, score_raw

    w = random_weight(size, size, n, device="cuda")
    survivors = remove(w.values, w.ids, n, zeta=0.1, temperature=2.0, impl="triton", **NOISE)
    (lowest, highest), seen = ranges(score_raw(survivors[None]), size, size)
    assert lowest <= seen[0] <= seen[1] <= highest


def test_a_window_that_misses_is_found_out(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks are drawn of hundreds: the window is wrong more often than not, the result never."""
    from chts_kernels.ops.remove import triton_remove

    monkeypatch.setattr(triton_remove, "SAMPLE_LINKS", 16)
    w = random_weight(64, 96, device=device)
    w.values.mul_(torch.linspace(-9, 9, 64, device=device).exp()[:, None])
    for step in range(8 if device == "cuda" else 1):
        for zeta in (0.02, 0.5, 0.98):
            got = remove(w.values, w.ids, zeta=zeta, temperature=9.0, step=step, impl="triton")
            assert torch.equal(got, remove_reference.remove(w.values, w.ids, 2, zeta, 9.0, "soft", 0, 0, step)), (step, zeta)


@pytest.mark.parametrize("digits", (1, 2))
@BOTH
def test_scores_are_within_the_stated_bound(n: int, digits: int, device: str) -> None:
    from chts_kernels.ops.score.triton_score import rounding_bound, score_many

    for rows, columns in shapes(device):
        w = random_weight(rows, columns, n, device=device)
        for zeta in (0.1, 0.5) if device == "cuda" else (0.3,):
            survivors = survivors_of(w, zeta)
            exact = score_reference.score(survivors, torch.float64)
            error = (score_many(survivors[None], digits=digits)[0].double() - exact).abs()
            assert (error <= rounding_bound(survivors, digits)).all(), (rows, columns, zeta)


def decompressed(values: torch.Tensor, metadata: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """int8 [rows, columns] from 2:4 values and the metadata of wgmma.sp m64nNk64 as PTX ISA defines it: lane 4 g + 2 c + h of warp w
    holds row 16 w + 8 h + g, columns 32 c to 32 c + 31 of a k64 step."""
    words = metadata[: rows * columns // 32].cpu().view(rows // 64, columns // 64, 4, 8, 2, 2).permute(0, 2, 5, 3, 1, 4)
    nibbles = words.reshape(rows, columns // 32, 1) >> torch.arange(0, 32, 4, dtype=torch.int32) & 15
    nibbles = nibbles.reshape(rows, columns // 4).long()
    first, second = nibbles & 3, nibbles >> 2
    assert (first < second).all()
    pairs = values.cpu().view(rows, columns // 4, 2)
    out = torch.zeros(rows, columns // 4, 4, dtype=torch.int8)
    out.scatter_(2, torch.stack([first, second], 2), pairs)
    return out.view(rows, columns)


@BOTH
def test_compressed_survivors_are_the_survivors(n: int, device: str) -> None:
    from chts_kernels.ops.score import triton_score as kernels

    rows, columns, layers = 140, 260, 2
    w = random_weight(rows, columns, n, device=device)
    survivors = torch.stack([survivors_of(w, zeta) for zeta in (0.1, 0.5)])
    a, b = kernels.padded(rows), kernels.padded(columns)
    elements = a * b
    for digits in (1, 2):
        operands = torch.zeros(layers * (a + b), (a + b) * digits, dtype=torch.int8, device=device)
        zeroed = torch.zeros(layers * (a + b + 4), dtype=torch.int32, device=device)
        degrees, state = zeroed[: layers * (a + b)].view(layers, -1), zeroed[layers * (a + b) :].view(layers, 4)
        size = layers * kernels.compressed_bytes(a, b)
        sides = [kernels._split(torch.zeros(size, dtype=torch.int8, device=device), layers * elements // 2) for _ in range(2)]
        kernels.EXPAND(
            a // 128 * (b // 128) * layers, survivors, operands, degrees, state, *sides[0], *sides[1], rows // 4, columns // 4,
            a // 128, b // 128, layers, DIGITS=digits, SPARSE=True,
        )  # fmt: skip
        for layer in range(layers):
            mask = torch.zeros(a, b, dtype=torch.int8)
            mask[:rows, :columns] = score_reference.link_mask(survivors[layer], torch.int8).cpu()
            for (values, metadata), matrix in zip(sides, (mask, mask.t()), strict=True):
                of_layer = slice(layer * elements // 2, None), slice(layer * elements // 32, None)
                got = decompressed(values[of_layer[0]][: elements // 2], metadata[of_layer[1]], *matrix.shape)
                assert torch.equal(got, matrix)
            assert torch.equal(degrees[layer].cpu(), torch.cat([mask.sum(1), mask.sum(0)]).int())
            assert state[layer].tolist() == [int(mask.sum()), 0, 0, 0]


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "columns"), ((512, 1376), (1376, 512), (2048, 128), (260, 900)))
def test_products_of_compressed_survivors(rows: int, columns: int) -> None:
    """The same integers as the dense products."""
    from chts_kernels.ops.score import multiply, triton_score

    if not multiply.hopper(torch.device("cuda")):
        pytest.skip("these products are for compute capability 9.0")
    survivors = torch.stack([survivors_of(random_weight(rows, columns, device="cuda"), zeta) for zeta in (0.1, 0.6)])
    for digits in (1, 2):
        scores = [triton_score.score_many(survivors, digits=digits, config=config) for config in ("sparse", "triton")]
        assert torch.equal(*scores)


@BOTH
def test_operands_follow_an_update(n: int, device: str) -> None:
    """Operands that were up to date are so afterwards, bit for bit; others are left to the next packing."""
    for dtype in (torch.float32, torch.float16) if device == "cuda" else (torch.float16 if n == 1 else torch.float32,):
        w, stale = (random_weight(72, 68, n, dtype, device=device) for _ in range(2))
        operands, left = w.operands(torch.float16), stale.operands(torch.float16)
        stale.values.mul_(2)
        for step in (1, 2) if device == "cuda" else (1,):
            evolve_many([w, stale], zeta=0.4, step=step, impl="triton")
            assert operands.fresh(w.values, w.ids) and not left.fresh(stale.values, stale.ids)
            anew = SparseWeight(w.ids, w.values, n).operands(torch.float16)
            for name in ("values", "meta", "values_t", "meta_t"):
                assert_bitwise_equal(getattr(operands, name), getattr(anew, name))
        anew = SparseWeight(stale.ids, stale.values, n).operands(torch.float16)
        assert_bitwise_equal(stale.operands(torch.float16).values_t, anew.values_t)


def test_scores_of_structured_topologies(device: str) -> None:
    """Equal patterns everywhere: overlaps of 0 and of the whole degree, far outside the range of a random graph."""
    from chts_kernels.ops.score.triton_score import rounding_bound, score_many

    w = random_weight(32, 160, device=device)
    w.ids[:4], w.ids[4:] = 0, 89
    for zeta in (0.0, 0.02, 1.0) if device == "cuda" else (0.02,):
        survivors = survivors_of(w, zeta)
        exact = score_reference.score(survivors, torch.float64)
        error = (score_many(survivors[None])[0].double() - exact).abs()
        assert (error <= rounding_bound(survivors)).all(), zeta


@pytest.mark.parametrize("mode", ("soft", "greedy", "random"))
@BOTH
def test_regrow_equals_the_reference_on_equal_scores(n: int, mode: str, device: str) -> None:
    for rows, columns in shapes(device):
        w = random_weight(rows, columns, n, device=device)
        for zeta in (0.1, 0.5, 1.0) if device == "cuda" else (0.5,):
            survivors = survivors_of(w, zeta)
            base = torch.rand(rows, columns, device=device, generator=torch.Generator(device).manual_seed(1))
            for scores in (300 + 9 * base, (3 * base).floor(), base.double()):  # ties among them
                got = regrow(scores, survivors, n, mode=mode, impl="triton", **NOISE)
                want = regrow_reference.regrow(scores, survivors, n, mode, *NOISE.values())
                assert torch.equal(got, want), (rows, columns, zeta, scores.dtype)


@BOTH
def test_carry_over_equals_the_reference(n: int, device: str) -> None:
    for rows, columns in shapes(device):
        old, new = (random_weight(rows, columns, n, seed=seed, device=device) for seed in (0, 5))
        values = old.values.clone()
        values[:, ::3], values[0] = -0.0, torch.nan
        tensors = [values, values.bfloat16(), values.double(), (values * 9).nan_to_num().to(torch.int16), values > 0]
        tensors += [values.clone() for _ in range(5)]
        expected = [t.clone() for t in tensors]
        carry_over_reference.carry_over_(expected, old.ids, new.ids, n)
        versions = [t._version for t in tensors]
        carry_over_(tensors, old.ids, new.ids, n, impl="triton")
        for got, want, version in zip(tensors, expected, versions, strict=True):
            assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
            assert got._version > version


@pytest.mark.parametrize(("removal", "regrowth"), (("soft", "soft"), ("hard", "greedy"), ("soft", "random")))
@BOTH
def test_evolve_is_its_four_operations(n: int, removal: str, regrowth: str, device: str) -> None:
    for rows, columns in shapes(device):
        w = random_weight(rows, columns, n, device=device)
        moments = [torch.randn_like(w.values), torch.randn_like(w.values).bfloat16()]
        old_ids, old_values, old_moments = w.ids.clone(), w.values.clone(), [m.clone() for m in moments]
        survivors = remove_reference.remove(w.values, w.ids, n, 0.3, 2.0, removal, *NOISE.values())
        scores = score(survivors, impl="triton")
        ids = regrow_reference.regrow(scores, survivors, n, regrowth, *NOISE.values())
        greedy = regrow_reference.regrow(scores, survivors, n, "greedy", 0, 0, 0)
        expected = [old_values.clone(), *(m.clone() for m in old_moments)]
        carry_over_reference.carry_over_(expected, old_ids, ids, n)
        versions = w.ids._version, w.values._version
        result = evolve(
            w, zeta=0.3, temperature=2.0, removal=removal, regrowth=regrowth, moments=moments, stats=True, impl="triton",
            **NOISE,
        )  # fmt: skip
        assert torch.equal(result.survivors, survivors)
        assert torch.equal(result.old_ids, old_ids)
        assert torch.equal(w.ids, ids)
        for got, want in zip([w.values, *moments], expected, strict=True):
            assert_bitwise_equal(got, want)
        assert w.ids._version > versions[0] and w.values._version > versions[1]
        assert result.removed == int(0.3 * w.links)
        for name, figure in evolution_stats(old_ids, ids, survivors, scores, greedy, n).items():
            assert result.stats[name].item() == pytest.approx(figure.item(), rel=1e-6, abs=1e-6, nan_ok=True), name


@BOTH
def test_batches_and_schedules_do_not_show(n: int, device: str) -> None:
    skip_some(n, device)
    sizes = [(32, 48), (32, 32), (32, 48), (32, 48)]
    weights = [random_weight(*size, n, seed=index, device=device) for index, size in enumerate(sizes)]
    weights[3].values = weights[3].values.bfloat16()
    alone, scheduled = [clone(w) for w in weights], [clone(w) for w in weights]
    moments = [[w.values * 2, w.values.double()] for w in weights]
    evolve_many(weights, zeta=0.3, temperature=3.0, seed=5, step=9, moments=moments, impl="triton")
    for index, w in enumerate(alone):
        evolve(w, zeta=0.3, temperature=3.0, seed=5, step=9, layer=index, impl="triton")
    schedule = torch.tensor([0.3, 3.0, 9.0], dtype=torch.float64, device=device)
    results = evolve_many(scheduled, zeta=0.9, temperature=1.0, seed=5, step=1, schedule=schedule, impl="triton")
    for index, (a, b, c) in enumerate(zip(weights, alone, scheduled, strict=True)):
        assert torch.equal(a.ids, b.ids) and torch.equal(a.ids, c.ids), index
        assert_bitwise_equal(a.values, b.values)
        assert_bitwise_equal(a.values, c.values)
        assert_bitwise_equal(moments[index][0], a.values * 2)
        assert results[index].removed is None


def test_tile_sizes_do_not_show(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from chts_kernels.ops._batch import table
    from chts_kernels.ops.regrow.triton_regrow import regrow_many
    from chts_kernels.ops.remove.triton_remove import remove_many
    from chts_kernels.ops.score import triton_score
    from chts_kernels.ops.score.triton_score import score_many

    w = random_weight(*((1376, 512) if device == "cuda" else (132, 64)), device=device)
    survivors = [remove_many([w.values], [w.ids], 2, 0.2, 2.0, "soft", 1, [2], 3, tile=tile) for tile in (64, 256)]
    assert torch.equal(*survivors)
    scores = score_many(survivors[0])
    with monkeypatch.context() as patch:
        patch.setattr(triton_score, "STRIPS_FROM", -1)
        assert torch.equal(score_many(survivors[0]), scores)
    if device == "cuda":  # Triton's own products too, which is what runs on other devices
        for config in ("128x256", "256x128", "128x128", "triton"):
            assert torch.equal(score_many(survivors[0], config=config), scores), config
    pointers = table([[0], [0], [2]], w.ids.device)
    ids = [regrow_many(scores, survivors[0], 2, "soft", 1, pointers, 3, block=block)[0] for block in (32, 128)]
    assert torch.equal(*ids)


@BOTH
def test_values_may_start_anywhere(n: int, device: str) -> None:
    """An update works on the tensors themselves, such as parts of a flat buffer."""
    aligned = random_weight(24, 20, n, device=device)
    flat = torch.empty(aligned.values.numel() + 1, device=device)
    values = flat[1:].view(aligned.values.shape).copy_(aligned.values)
    shifted = SparseWeight(aligned.ids.clone(), values, n)
    for w in (aligned, shifted):
        evolve(w, zeta=0.3, step=4, impl="triton")
    assert torch.equal(aligned.ids, shifted.ids) and torch.equal(aligned.values, values)


@BOTH
def test_replay(n: int, device: str) -> None:
    skip_some(n, device)
    start = random_weight(64, 64, n, device=device)
    first, again, other = clone(start), clone(start), clone(start)
    for w, seed in ((first, 7), (again, 7), (other, 8)):
        for step in (100, 200):
            evolve(w, zeta=0.4, seed=seed, layer=1, step=step, impl="triton")
    assert torch.equal(first.ids, again.ids) and torch.equal(first.values, again.values)
    assert not torch.equal(first.ids, other.ids)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ("soft", "greedy"))
@pytest.mark.parametrize(("rows", "columns", "n"), ((512, 512, 2), (512, 512, 1), (1376, 512, 2), (2048, 2048, 2), (2048, 4096, 1)))
def test_blocks_that_differ_from_float64_have_margins_within_the_bound(rows: int, columns: int, n: int, mode: str) -> None:
    from chts_kernels.ops.score.triton_score import rounding_bound

    w = random_weight(rows, columns, n, device="cuda")
    survivors = survivors_of(w)
    exact = score_reference.score(survivors, torch.float64)
    got = regrow(score(survivors, impl="triton"), survivors, n, mode=mode, impl="triton", **NOISE)
    want = regrow_reference.regrow(exact, survivors, n, mode, *NOISE.values())
    xi = torch.ones_like(exact)
    if mode == "soft":
        bits = rng.random_bits(rows, columns, purpose=rng.Purpose.REGROW, device="cuda", **NOISE)
        xi = rng.uniform(bits).double()
    masks = pattern_table(n).tensor("masks", "cuda").double()
    difference = masks[want.long()] - masks[got.long()]
    margin = (blocks(exact * xi) * difference).sum((2, 3))
    allowed = (blocks(rounding_bound(survivors) * xi) * difference.abs()).sum((2, 3))
    allowed += 2.0**-21 * blocks(exact * xi).sum((2, 3))  # float32 products and sums
    assert (margin <= allowed).all()
    assert (got != want).double().mean() < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "zeta", "share"), ((2, 0.1, 0.1014), (2, 0.2, 0.3161), (2, 0.3, 0.5467), (1, 0.1, 0.0523)))
def test_shares_of_blocks_that_can_change(n: int, zeta: float, share: float) -> None:
    """ALGORITHM section 3, with removal that does not look at the weights."""
    w = random_weight(2048, 2048, n, device="cuda")
    stats = evolve(w, zeta=zeta, temperature=1e-6, stats=True, impl="triton", **NOISE).stats
    assert stats["can_change_blocks"].item() / w.ids.numel() == pytest.approx(share, abs=0.004)


@pytest.mark.gpu
def test_real_turnover_is_a_seventh_of_zeta() -> None:
    stats = evolve(random_weight(2048, 2048, device="cuda"), temperature=1e-6, stats=True, impl="triton", **NOISE).stats
    assert stats["turnover"].item() == pytest.approx(0.0145, abs=0.0005)
    assert stats["noise_changed_blocks"].item() == pytest.approx(0.0545, abs=0.003)


@pytest.mark.gpu
def test_no_update_waits_for_the_device() -> None:
    w = random_weight(512, 512, device="cuda")
    moments = [w.values.clone(), w.values.clone()]
    evolve(w, moments=moments, stats=True, impl="triton")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        evolve(w, moments=moments, stats=True, step=1, impl="triton")
        evolve(w, moments=moments, removal="hard", regrowth="random", step=2, impl="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_captured_graph_follows_the_schedule() -> None:
    weights = [random_weight(512, 512, seed=index, device="cuda") for index in range(3)]
    start, schedule = [clone(w) for w in weights], torch.tensor([0.1, 1.0, 100.0], dtype=torch.float64, device="cuda")
    evolve_many(weights, schedule=schedule, impl="triton")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        evolve_many(weights, schedule=schedule, impl="triton")
    for zeta, temperature, step in ((0.1, 1.5, 200), (0.3, 4.0, 300)):
        for w, s in zip(weights, start, strict=True):
            w.ids.copy_(s.ids)
            w.values.copy_(s.values)
        schedule.copy_(torch.tensor([zeta, temperature, step], dtype=torch.float64))
        graph.replay()
        for index, (w, s) in enumerate(zip(weights, start, strict=True)):
            eager = clone(s)
            evolve(eager, zeta=zeta, temperature=temperature, step=step, layer=index, impl="triton")
            assert torch.equal(w.ids, eager.ids) and torch.equal(w.values, eager.values)


def test_what_cannot_run_says_why() -> None:
    w = random_weight(8, 8)
    if interpreted():
        with pytest.raises(RuntimeError, match=r"evolve.*contiguous.*strides"):
            evolve(w, moments=[torch.zeros(4, 8).t()], impl="triton")
        return
    for call in (
        lambda: remove(w.values, w.ids, impl="triton"),
        lambda: score(survivors_of(w), impl="triton"),
        lambda: regrow(None, survivors_of(w), mode="random", impl="triton"),
        lambda: carry_over_([w.values], w.ids, w.ids, impl="triton"),
        lambda: evolve(w, impl="triton"),
    ):
        with pytest.raises(RuntimeError, match="it needs NVIDIA CUDA tensors"):
            call()
