"""chts::adamw_: the reference against torch.optim.AdamW, the kernel against the reference, the law of stochastic rounding.

Kernel tests run twice, as in test_triton_pack_prune.py: ``cpu`` cases inside a process started with TRITON_INTERPRET=1, ``cuda``
cases where there is a device.
"""

from __future__ import annotations

import re

import pytest
import torch

from chts_kernels import pack_operands_
from chts_kernels.ops import _triton
from chts_kernels.ops.adamw import ADAMW_, adamw_
from chts_kernels.ops.adamw.reference import round_stochastically
from chts_kernels.ops.pack import empty_operands
from chts_kernels.testing import assert_bitwise_equal, random_tensor, random_weight

triton = pytest.importorskip("triton")
tl = triton.language
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
INTERPRETED = _triton.interpreting()
CPU = pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="runs under TRITON_INTERPRET=1"))
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="interpreting")])
ON_DEVICES = pytest.mark.parametrize("device", [CPU, CUDA])
BOTH = pytest.mark.parametrize("n", (1, 2))
SHAPES = [(64, 48), (4, 4), (12, 20), (64, 20), (12, 64)]
"""An even number of blocks one way, the other way, both, neither."""
OTHERS = {"weight_decay": 0.0, "maximize": True, "beta1": 0.0, "eps": 0.01}


class Layers:
    """The arguments of adamw_ for a few layers, every one drawn from its own seed."""

    def __init__(self, n, shapes=SHAPES, device="cpu", values=FP32, moments=FP32, grads=None, compute=FP16, shared=False):
        weights = [random_weight(*s, n, seed=i) for i, s in enumerate(shapes)]
        grads, self.n = grads or values, n

        def draw(seed, dtype, size=1.0):
            return [(random_tensor(w.values.shape, seed=seed + i) * size).to(device, dtype) for i, w in enumerate(weights)]

        self.ids = [w.ids.to(device) for w in weights]
        self.values, self.grads = draw(100, values), draw(200, grads)
        self.exp_avgs, self.exp_avg_sqs = draw(300, moments, 0.1), [v.abs() for v in draw(400, moments, 0.1)]
        self.steps = [torch.tensor(float(3 + i), device=device) for i in range(len(shapes))]
        made = [empty_operands(*s, compute, torch.device(device)) for s in shapes] if compute else []
        self.operands = self.values if shared else [o[0].zero_() for o in made]
        self.operands_t = [o[2].zero_() for o in made]

    def step(self, **options):
        options = {"lr": 1e-2, "weight_decay": 0.1} | options
        adamw_(self.values, self.grads, self.exp_avgs, self.exp_avg_sqs, self.steps, self.ids, self.n, operands=self.operands,
               operands_t=self.operands_t, **options)  # fmt: skip
        return self

    def written(self):
        return [t.cpu() for ts in (self.values, self.exp_avgs, self.exp_avg_sqs, self.operands, self.operands_t) for t in ts]


@BOTH
@pytest.mark.parametrize("maximize", (False, True))
def test_the_reference_is_torch_adamw(n, maximize):
    layers = Layers(n, values=FP64, moments=FP64, compute=None)
    parameters = [torch.nn.Parameter(v.clone()) for v in layers.values]
    for state in (layers.exp_avgs, layers.exp_avg_sqs, layers.steps):
        for t in state:
            t.zero_()
    options = {"lr": 0.01, "eps": 1e-6, "weight_decay": 0.2}
    optimizer = torch.optim.AdamW(parameters, betas=(0.8, 0.99), foreach=False, maximize=maximize, **options)
    for step in range(4):
        for i, p in enumerate(parameters):
            layers.grads[i] = random_tensor(p.shape, FP64, seed=100 * step + i)
            p.grad = layers.grads[i].clone()
        optimizer.step()
        for t in layers.steps:
            t += 1
        layers.step(beta1=0.8, beta2=0.99, maximize=maximize, impl="reference", **options)
    for i, p in enumerate(parameters):
        torch.testing.assert_close(layers.values[i], p.detach(), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(layers.exp_avgs[i], optimizer.state[p]["exp_avg"], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(layers.exp_avg_sqs[i], optimizer.state[p]["exp_avg_sq"], rtol=1e-12, atol=1e-14)


@BOTH
def test_the_reference_writes_the_operands_of_the_new_values(n):
    layers = Layers(n, compute=BF16).step(impl="reference")
    for i, ids in enumerate(layers.ids):
        expected = empty_operands(ids.shape[0] * 4, ids.shape[1] * 4, BF16, ids.device)
        pack_operands_(layers.values[i], ids, n, *expected, impl="reference")
        assert_bitwise_equal(layers.operands[i], expected[0])
        assert_bitwise_equal(layers.operands_t[i], expected[2])


def test_found_inf_changes_nothing_and_the_scale_divides():
    scale, ones = torch.tensor(8.0), torch.tensor(1.0)
    before = Layers(2)
    for got, old in zip(Layers(2, compute=None).step(found_inf=ones, impl="reference").written(), before.written(), strict=False):
        assert_bitwise_equal(got, old)
    scaled = Layers(2)
    for g in scaled.grads:
        g *= 8
    scaled.step(grad_scale=scale, found_inf=0 * ones, impl="reference")
    for got, expected in zip(scaled.written(), Layers(2).step(impl="reference").written(), strict=True):
        assert_bitwise_equal(got, expected)
    assert_bitwise_equal(scaled.grads[0], Layers(2).grads[0])


def test_stochastic_rounding_is_unbiased_and_rounds_to_neighbours():
    x = torch.cat([random_tensor((64,)) * 10.0 ** torch.randint(-30, 30, (64,)), torch.tensor([1e-40, -3e38, 0.0, -0.0])])
    noise = torch.arange(1 << 16)[:, None]
    rounded = round_stochastically(x[None].expand(1 << 16, -1).contiguous(), noise)
    exact = (x.view(torch.int32) & 0xFFFF) == 0
    low = (x.view(torch.int32) & -65536).view(FP32)
    assert bool(((rounded.float() == low) | (rounded.float() != rounded[0].float()) | exact).all())
    assert len(torch.unique(rounded[:, 0].float())) <= 2
    ulp = (rounded.double().amax(0) - rounded.double().amin(0)).clamp(min=1e-300)
    error = (rounded.double().mean(0) - x.double()).abs() / ulp
    assert float(error[~exact].max()) < 2.0**-16 and bool((rounded[:, exact].float() == x[exact]).all())
    special = torch.tensor([torch.inf, -torch.inf, torch.nan])
    assert round_stochastically(special, torch.full((3,), 0xFFFF)).float().tolist()[:2] == [torch.inf, -torch.inf]
    assert round_stochastically(special, torch.full((3,), 0xFFFF))[2].isnan()


def test_noise_follows_seed_layer_and_step():
    def moments(seed=1, layers=(4, 5, 6, 7, 8), step=0):
        made = Layers(2, moments=BF16, compute=None)
        for s in made.steps:
            s += step
        return made.step(seed=seed, layers=layers, impl="reference", beta1=0.5).exp_avgs

    base = moments()
    for got, expected in zip(moments(), base, strict=True):
        assert_bitwise_equal(got, expected)
    for other in (moments(seed=2), moments(layers=(5, 6, 7, 8, 9)), moments(step=1)):
        assert not torch.equal(other[0], base[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 1.0, "beta1": 1.0}, r"beta1: must be in \[0, 1.0\), got 1.0"),
        ({"lr": 1.0, "layers": [0]}, "layers: must have one entry per layer, 5, got 1"),
        ({"lr": 1.0, "seed": -1}, "seed: must"),
        ({"lr": 1.0, "impl": "nonsense"}, "impl: must"),
    ],
)
def test_errors_name_the_argument(change, message):
    layers = Layers(2)
    with pytest.raises(ValueError, match=message):
        layers.step(**change)
    layers.exp_avgs[1] = layers.exp_avgs[1][:2]
    with pytest.raises(ValueError, match=r"exp_avgs\[1\]: must have shape"):
        layers.step()


# --- the kernel


@pytest.mark.skipif(INTERPRETED, reason="this is the process it starts")
@pytest.mark.timeout(600)
def test_under_the_interpreter(interpreted):
    assert interpreted.returncode == 0, interpreted.stdout[-6000:] + interpreted.stderr[-2000:]


def compare(n, device, *, tolerance=4e-6, shapes=SHAPES, dtypes=None, **options):
    """Kernel against reference: moments and values within rounding, operands exactly those of the kernel's own values."""
    dtypes = dtypes or {}
    got = Layers(n, shapes, device, **dtypes).step(impl="triton", **options)
    expected = Layers(n, shapes, device, **dtypes).step(impl="reference", **options)
    for a, b in zip(got.written()[: 3 * len(shapes)], expected.written(), strict=False):
        rounding = {BF16: 2.0**-7, FP16: 2.0**-11, FP32: 0.0}[a.dtype]
        torch.testing.assert_close(a.float(), b.float(), rtol=tolerance + rounding, atol=tolerance)
    for i, ids in enumerate(got.ids):
        operands = got.operands_t
        if operands:
            fresh = empty_operands(ids.shape[0] * 4, ids.shape[1] * 4, operands[i].dtype, ids.device)
            pack_operands_(got.values[i], ids, n, *fresh, impl="reference")
            assert_bitwise_equal(got.operands_t[i], fresh[2])
            assert_bitwise_equal(got.operands[i], fresh[0]) if got.operands else None
    return got


@ON_DEVICES
@pytest.mark.parametrize(("n", "options"), [(1, {}), (2, {}), (2, OTHERS)], ids=("n1", "n2", "others"))
def test_the_kernel_is_the_reference(n, options, device):
    # The interpreter does not round to bfloat16. On a device every combination of odd sizes is a kernel to compile: two of four do.
    compare(n, device, shapes=SHAPES if INTERPRETED else SHAPES[:3], dtypes={"compute": FP16 if INTERPRETED else BF16}, **options)


@ON_DEVICES
def test_the_kernel_without_operands_or_with_one(device):
    compare(2, device, shapes=SHAPES[:1], dtypes={"compute": None})
    compare(2, device, shapes=SHAPES[:1], dtypes={"values": FP16, "compute": FP16, "shared": True}, tolerance=1e-3)


@ON_DEVICES
def test_the_kernel_on_the_rate_scale_and_skip_of_the_device(device):
    scale, one = torch.tensor(4.0, device=device), torch.ones((), device=device)
    on_device = {"lr": torch.tensor(0.02, device=device), "grad_scale": scale}
    compare(2, device, shapes=SHAPES[:1], found_inf=0 * one, **on_device)
    before = Layers(2, SHAPES[:1], device)
    after = Layers(2, SHAPES[:1], device).step(found_inf=one, impl="triton", **on_device)
    for a, b in zip(after.written(), before.written(), strict=True):
        assert_bitwise_equal(a, b)


@ON_DEVICES
@BOTH
def test_the_kernel_rounds_stochastically_as_the_reference_does(n, device):
    shapes = SHAPES if INTERPRETED else SHAPES[:1] * 2
    options = {"seed": 7, "layers": list(range(9, 9 - len(shapes), -1))}
    made = [Layers(n, shapes, device, moments=BF16).step(impl=impl, **options) for impl in ("triton", "reference")]
    same = [(a == b).double().mean().item() for a, b in zip(made[0].exp_avgs, made[1].exp_avgs, strict=True)]
    # The noise is the same; a last bit of the float32 moment before it may carry into another bfloat16.
    assert min(same) > (0.99 if INTERPRETED else 0.9), same


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="interpreting")
@pytest.mark.parametrize("moments", (FP32, BF16), ids=str)
def test_large_layers_and_new_addresses(moments):
    shapes = [(2048, 512), (512, 1376), (1028, 516), (768, 3072)]
    options = {"seed": 3} if moments == BF16 else {}
    for _ in range(3):  # fresh tensors every time: the tables of pointers must follow
        compare(2, "cuda", shapes=shapes, dtypes={"moments": moments, "compute": BF16}, **options)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="interpreting")
def test_captured_steps_go_on_after_eager_ones():
    eager, captured, others = (Layers(2, SHAPES[:3], "cuda", compute=BF16) for _ in range(3))

    def count(layers):
        torch._foreach_add_(layers.steps, 1)
        layers.step(impl="triton")

    count(eager), count(captured)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        count(captured)
    for _ in range(3):
        count(eager)
        graph.replay()
        others.grads = [g.clone() for g in others.grads]
        others.step(impl="triton")
    for a, b in zip(captured.written(), eager.written(), strict=True):
        assert_bitwise_equal(a, b)


def compiled(values, moments, *, vectors=(True, True), n=2, stochastic=False):
    from chts_kernels.ops.adamw.triton_adamw import ADAMW

    kinds = {tl.float32: "*fp32", tl.bfloat16: "*bf16"}
    names = [name for name in ADAMW.function.arg_names if name.islower()]
    pointers = {"table_ptr": "*i64", "grads_ptr": "*i64", "patterns_ptr": "*i64"}
    types = tuple(pointers.get(name) or (kinds[tl.float32] if name.endswith("_ptr") else ADAMW.scalars[name]) for name in names)
    constants = {
        "VALUE": values, "MOMENT": moments, "DTYPE": tl.bfloat16, "GRAD": values, "LINKS": n, "LAYERS": 64, "HAS_OPERAND": True,
        "HAS_OPERAND_T": True, "LR_TENSOR": False, "SCALED": False, "MAY_SKIP": False, "MAXIMIZE": False, "STOCHASTIC": stochastic,
        "VECTOR_N": vectors[0], "VECTOR_K": vectors[1], "LANES_N": 8, "LANES_K": 32,
    }  # fmt: skip
    return ADAMW.compile(types, tuple(constants.items()), 8, (9, 0))


@pytest.mark.skipif(INTERPRETED, reason="interpreting")
@pytest.mark.parametrize(("moments", "stochastic"), [(tl.float32, False), (tl.bfloat16, True)], ids=("fp32", "bf16"))
def test_compiled_every_number_moves_in_words_and_by_one_thread(moments, stochastic):
    made = compiled(tl.float32, moments, stochastic=stochastic)
    ptx = made.asm["ptx"]
    assert made.metadata.shared <= 64  # the search for the layer, nothing else
    found = [len(re.findall(rf"st\.global\.b{bits}", ptx)) for bits in (64, 32)]
    # 8 rows of p, m and v, 4 columns of W^T; pairs of bfloat16 and the rows of the operand are of 32 bits.
    assert found == ([24 + 4, 8] if moments == tl.float32 else [8 + 4, 16 + 8])
    assert not re.search(r"(ld|st)\.global\.b16", ptx)


def test_the_kernel_says_why_it_cannot_run():
    layers = Layers(2)
    if not INTERPRETED:
        with pytest.raises(RuntimeError, match="'triton' cannot run chts.adamw_ here: it needs NVIDIA CUDA tensors"):
            layers.step(impl="triton")
    assert ADAMW_.names == ["auto", "reference", "triton"]
