"""torch.compile of a layer and of whole models: one graph, any number of tokens, no recompilation, always today's weight."""

from __future__ import annotations

import contextlib
import shutil

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from torch import nn

from chts_kernels.layout.metadata import ids_from_metadata
from chts_kernels.ops import spmm as spmm_package
from chts_kernels.ops.pack.reference import unpack
from chts_kernels.ops.weight_grad import WEIGHT_GRAD, WEIGHT_GRAD_MVUE
from chts_train import SparseLinear, SparsityConfig, TopologyEvolver, TopologySchedule, sparsify_
from chts_train.models import Llama, LlamaConfig, ViT, ViTConfig

SCHEDULE = TopologySchedule(total_steps=100, interval=2, stop_fraction=1.0, zeta=0.3)
INDUCTOR = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")


@contextlib.contextmanager
def compiled_once():
    """Counts graphs from a clean slate; a second graph, or a break in the first, is an error."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"], dict(counters)


def recompiling_is_an_error():
    return torch._dynamo.config.patch(error_on_recompile=True)


def compare(build, batches, backend, device="cpu", error=0.0, autocast=contextlib.nullcontext, **options):
    """Train a compiled model, its topology updated at every second step; its gradients against those of an eager pass.

    ``error``: allowed relative error of a gradient, in norms; 0 asks for equal bits.
    """
    model = build().to(device)
    sparsify_(model, SparsityConfig(seed=1))
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    evolver = TopologyEvolver(model, optimizer, SCHEDULE, seed=5)
    with compiled_once():
        network = torch.compile(model, fullgraph=True, dynamic=options.pop("dynamic", True), backend=backend, **options)
        for number, batch in enumerate(batches):
            batch = [t.to(device) for t in batch]
            if options.get("mode"):
                torch.compiler.cudagraph_mark_step_begin()
            with recompiling_is_an_error() if number else contextlib.nullcontext(), autocast():
                network(*batch).backward()
            with autocast():
                expected = torch.autograd.grad(model(*batch), parameters)
            for parameter, grad in zip(parameters, expected, strict=True):
                difference = (parameter.grad - grad).float().norm()
                assert difference <= error * grad.float().norm(), (number, tuple(grad.shape), float(difference))
            if evolver.step():
                optimizer.step()
            optimizer.zero_grad()
    assert evolver.updates == len(batches) // 2


def llama() -> Llama:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Llama(LlamaConfig(**sizes, max_position_embeddings=256))


def texts(lengths) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [tuple(torch.randint(64, (3, t), generator=draw) for _ in range(2)) for t in lengths]


def vit() -> ViT:
    # Eight classes: where a dense layer's sizes are no multiples of 8, inductor's pass that pads products on CUDA compares the
    # batch size with them, and its guards can leave a single one.
    torch.manual_seed(0)
    return ViT(ViTConfig(image_size=8, patch_size=4, in_channels=1, num_classes=8, embed_dim=16, depth=2, num_heads=2))


def pictures(sizes) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [(torch.randn(b, 1, 8, 8, generator=draw), torch.randint(3, (b,), generator=draw)) for b in sizes]


class Loss(nn.Module):
    """A layer with a loss, so that it trains by itself."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).float().square().mean()


def test_llama_is_one_graph_for_any_number_of_tokens_and_any_topology():
    compare(llama, texts((7, 12, 5, 33)), "aot_eager")


def test_vit_is_one_graph_for_any_batch_and_any_topology():
    compare(vit, pictures((4, 7, 3, 5)), "aot_eager", error=1e-5)


@INDUCTOR
def test_a_layer_under_inductor():
    compare(lambda: Loss(16, 24), [(torch.randn(t, 16),) for t in (5, 9, 4, 12)], "inductor", error=1e-5)


@pytest.mark.parametrize("n", (1, 2))
def test_a_layer_alone_with_marked_dimensions(n):
    layer = SparseLinear(16, 24, n=n)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    model = nn.Sequential(layer)
    evolver = TopologyEvolver(model, optimizer, SCHEDULE)
    with compiled_once():
        network = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for number, tokens in enumerate((5, 3, 8, 17)):
            x = torch.randn(2, tokens, 16, requires_grad=True)
            torch._dynamo.mark_dynamic(x, 1)
            with recompiling_is_an_error() if number else contextlib.nullcontext():
                y = network(x)
                ours = torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))
            plain = torch.autograd.grad(layer(x).square().sum(), (x, *layer.parameters()))
            assert torch.equal(y, layer(x)) and all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
            for parameter in layer.parameters():
                parameter.grad = torch.ones_like(parameter)
            if evolver.step():
                optimizer.step()
    assert evolver.updates == 2


# --- Freshness: what a graph reads is the weight of the day, in whatever way it changed


def operand_reader(op, transposed: bool, reads: list):
    """A kernel that sees the weight through its operands alone, as the sparse tensor cores do (n = 2)."""

    def run(x, values, ids, n, *rest):
        operand, meta = rest[-2:]
        if operand is None:
            packed = spmm_package._packed(values, ids, n, x.dtype)
            operand, meta = packed[2:] if transposed else packed[:2]
        reads.append(op.name)
        rows, columns = operand.shape[0], operand.shape[1] * 2
        weight = unpack(operand, ids_from_metadata(meta, rows, columns, n).to(torch.uint8), n)
        y = x @ weight.t()
        return y if len(rest) == 2 or rest[0] is None else y + rest[0]

    op.kernel("operand_reader", lambda *_: None)(run)


@pytest.fixture(params=("packed by the graph", "packed by the kernel"))
def operands_alone(request, monkeypatch):
    """On the CPU what runs on a GPU: products that read derived operands only, for the layers that ask for it."""
    reads: list[str] = []
    for op in (spmm_package.SPMM, spmm_package.INPUT_GRAD, WEIGHT_GRAD):
        monkeypatch.setattr(op, "kernels", list(op.kernels))
        monkeypatch.setattr(op, "_chosen", {})
    operand_reader(spmm_package.SPMM, False, reads)
    operand_reader(spmm_package.INPUT_GRAD, True, reads)
    WEIGHT_GRAD.kernel("operand_reader", lambda *_: None)(WEIGHT_GRAD.reference)  # it reads no weight
    if request.param == "packed by the graph":
        monkeypatch.setattr(spmm_package, "_reads_operands", lambda x, impl: impl == "operand_reader")
    return reads


CHANGES = {
    "in place": lambda layer: layer.values.detach().mul_(2),
    "through .data": lambda layer: layer.values.data.mul_(2),
    "load_state_dict": lambda layer: layer.load_state_dict(SparseLinear(24, 16).state_dict()),
}


@pytest.mark.parametrize("fused", (False, True))
def test_compiled_steps_read_the_weight_of_the_day(operands_alone, fused):
    layer = SparseLinear(24, 16)
    layer.impl = "operand_reader"
    model = nn.Sequential(layer)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.3, fused=fused)
    evolver = TopologyEvolver(model, optimizer, SCHEDULE)

    def step(x: torch.Tensor) -> torch.Tensor:
        return model(x).float().square().mean()

    network = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.reset()

    def check(what: str) -> None:
        x = torch.randn(6, 24, dtype=torch.bfloat16, requires_grad=True)
        wanted = [x, *model.parameters()]
        before = len(operands_alone)
        ours = torch.autograd.grad(network(x), wanted)
        assert operands_alone[before:] == ["spmm", "input_grad"], what
        weight = layer.weight.to_dense().bfloat16().detach()
        plain = nn.functional.linear(x, weight, layer.bias.bfloat16()).float().square().mean()
        [expected] = torch.autograd.grad(plain, x)
        assert (ours[0] - expected).float().norm() <= 2e-2 * expected.float().norm(), what

    with recompiling_is_an_error():
        check("the first step")
        for _ in range(4):  # optimizer steps and topology updates in turn
            model.zero_grad()
            network(torch.randn(5, 24, dtype=torch.bfloat16, requires_grad=True)).backward()
            stays = evolver.step()
            if stays:
                optimizer.step()
            check("an optimizer step" if stays else "a topology update")
        for what, change in CHANGES.items():
            with torch.no_grad():
                change(layer)
            check(what)
    assert evolver.updates == 2


def test_the_graph_takes_values_and_ids_as_inputs():
    """Nothing of a weight is a constant of the graph: neither its tensors nor whether it was fresh when it was traced."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    nodes = []

    def record(module, _):
        nodes.extend(module.graph.nodes)
        return make_boxed_func(module.forward)

    layer = SparseLinear(24, 16)
    layer.weight.operands(torch.float16)  # fresh operands are there and must be of no account
    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    torch.compile(layer, fullgraph=True, backend=backend)(torch.randn(3, 24, requires_grad=True)).sum().backward()
    products = [node for node in nodes if "chts." in str(node.target)]
    assert [str(node.target) for node in products] == [f"chts.{n}.default" for n in ("spmm", "input_grad", "weight_grad")]
    assert not [node for node in nodes if node.op == "get_attr"]
    for node in products[:2]:
        _, values, ids, n, *derived = node.args
        assert values.op == ids.op == "placeholder" and n == 2 and not any(
            isinstance(argument, torch.fx.Node) and argument.op != "placeholder" for argument in derived
        )


@pytest.mark.parametrize("kind", (torch.optim.Adam, torch.optim.SGD))
def test_a_compiled_optimizer_outdates_what_was_derived(kind):
    layer = SparseLinear(16, 16)
    optimizer = kind(layer.parameters(), lr=0.5)
    torch._dynamo.reset()
    step = torch.compile(optimizer.step, backend="aot_eager")
    for _ in range(3):
        assert torch.equal(layer.weight.operands(torch.float16).values, layer.values.detach().half())
        for parameter in layer.parameters():
            parameter.grad = torch.randn_like(parameter)
        step()
    assert torch.equal(layer.weight.operands(torch.float16).values, layer.values.detach().half())


def test_products_say_that_rows_may_be_at_any_distance():
    for op in (spmm_package.SPMM, spmm_package.INPUT_GRAD, WEIGHT_GRAD, WEIGHT_GRAD_MVUE):
        assert torch.Tag.needs_fixed_stride_order in op.overload.tags, op.name


# --- on a GPU


def bf16():
    return torch.autocast("cuda", torch.bfloat16)


@pytest.mark.gpu
def test_llama_on_the_gpu():
    with torch._inductor.config.patch(compile_threads=4):
        compare(llama, texts((64, 96, 32, 48)), "inductor", "cuda", error=0.1, autocast=bf16)  # fused casts round less


@pytest.mark.gpu
def test_vit_on_the_gpu():
    with torch._inductor.config.patch(compile_threads=4):
        compare(vit, pictures((16, 24, 8, 16)), "inductor", "cuda", error=0.1, autocast=bf16)


@pytest.mark.gpu
def test_a_layer_captured_by_the_compiler():
    with torch._inductor.config.patch(compile_threads=4):
        batches = [(torch.randn(64, 128),) for _ in range(6)]
        compare(lambda: Loss(128, 256, 128), batches, "inductor", "cuda", error=0.03, autocast=bf16, dynamic=False,
                mode="reduce-overhead")  # fmt: skip


class Gated(nn.Module):
    """The inner size is one whose rows Inductor pads in what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(128, 1376), nn.Linear(128, 1376), nn.Linear(1376, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x)).float().square().mean()


@pytest.mark.gpu
def test_products_take_padded_rows_as_they_are():
    batches = [(torch.randn(256, 128),) for _ in range(4)]
    with torch._inductor.config.patch(compile_threads=4):
        compare(Gated, batches, "inductor", "cuda", error=0.1, autocast=bf16, dynamic=False)


@pytest.mark.gpu
@pytest.mark.parametrize("fused", (False, True))
def test_compiled_steps_on_the_gpu_read_the_weight_of_the_day(fused):
    torch.manual_seed(0)
    layer = SparseLinear(256, 512, device="cuda")
    model = nn.Sequential(layer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=fused)
    evolver = TopologyEvolver(model, optimizer, SCHEDULE)
    torch._dynamo.reset()
    network = torch.compile(lambda x: model(x).float().square().mean(), fullgraph=True, dynamic=True)
    for number in range(6):
        x = torch.randn(64 + 16 * number, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        with recompiling_is_an_error() if number else contextlib.nullcontext():
            ours = torch.autograd.grad(network(x), (x, layer.values))
        weight = layer.weight.to_dense().bfloat16().detach()
        plain = nn.functional.linear(x, weight, layer.bias.bfloat16()).float().square().mean()
        [expected] = torch.autograd.grad(plain, x)
        assert (ours[0] - expected).float().norm() <= 2e-2 * expected.float().norm(), number
        layer.values.grad = ours[1]
        layer.bias.grad = torch.zeros_like(layer.bias)
        if evolver.step():
            optimizer.step()
    assert evolver.updates == 3
