"""Resident operands: who follows with them, what notices that nobody did, and compiled passes that read them without packing."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch._dynamo
from torch import nn

from chts_kernels import SparseWeight, evolve
from chts_train import (
    FusedAdamW,
    SparseLinear,
    SparsityConfig,
    TopologyEvolver,
    TopologySchedule,
    make_operands_resident_,
    refresh_operands_,
    sparse_layers,
    sparsify_,
)

DTYPE = torch.bfloat16
NAMES = ("values", "meta", "values_t", "meta_t")
SCHEDULE = TopologySchedule(total_steps=100, interval=2, stop_fraction=1.0, zeta=0.3)


def build(n: int = 2, width: int = 16, dtype: torch.dtype = torch.float32, **config) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)).to(dtype)
    sparsify_(model, SparsityConfig(n=n, seed=1, **config))
    return model


def addresses(model: nn.Module) -> list[int]:
    return [getattr(layer._operands, name).data_ptr() for layer in sparse_layers(model).values() for name in NAMES]


def follows(model: nn.Module) -> bool:
    """Whether every layer's operands count as fresh, and are those of its values and ids packed anew."""
    for layer in sparse_layers(model).values():
        expected = SparseWeight(layer.ids.clone(), layer.values.detach().clone(), layer.n).operands(DTYPE)
        layer.require_fresh_operands()
        if not all(torch.equal(getattr(layer._operands, name), getattr(expected, name)) for name in NAMES):
            return False
    return True


def draw_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)


# --- writers that follow


@pytest.mark.parametrize("n", (1, 2))
@pytest.mark.parametrize("options", [{}, {"moment_dtype": torch.bfloat16}, {"amsgrad": True}])
def test_the_optimizer_and_the_evolver_follow_in_place(n, options):
    ours, plain = build(n), build(n)
    one = FusedAdamW(ours.parameters(), lr=1e-2, model=ours, resident_operands=DTYPE, **options)
    other = FusedAdamW(plain.parameters(), lr=1e-2, model=plain, **options)
    assert [layer.resident_operands for layer in sparse_layers(ours).values()] == [DTYPE, DTYPE]
    evolvers = TopologyEvolver(ours, one, SCHEDULE).attach(), TopologyEvolver(plain, other, SCHEDULE).attach()
    places = addresses(ours)
    assert follows(ours)
    for step in range(5):
        for model, optimizer in ((ours, one), (plain, other)):
            draw_gradients(model, step)
            optimizer.step()
            optimizer.zero_grad()
        assert follows(ours), step
    assert addresses(ours) == places and evolvers[0].updates == 2
    for name, tensor in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


def test_values_that_are_the_operand_themselves():
    model = build(dtype=DTYPE)
    optimizer = FusedAdamW(model.parameters(), lr=1e-2, model=model, resident_operands=DTYPE)
    evolver, places = TopologyEvolver(model, optimizer, SCHEDULE), addresses(model)
    assert places[0] == model[0].values.data_ptr()
    for step in range(4):
        draw_gradients(model, step)
        if evolver.step():
            optimizer.step()
        assert follows(model)
    assert addresses(model) == places


def test_loading_resetting_and_moving_follow():
    model, other = build(), build()
    make_operands_resident_(model)
    places = addresses(model)
    for layer in sparse_layers(other).values():
        layer.reset_parameters()
        layer.ids.copy_(SparseLinear(layer.in_features, layer.out_features).ids)
    model.load_state_dict(other.state_dict())
    assert follows(model) and addresses(model) == places
    assert torch.equal(model[0].ids, other[0].ids)
    model[0].load_state_dict({"values": torch.zeros_like(model[0].values)}, strict=False)
    assert follows(model) and not model[0]._operands.values.any()
    model[0].reset_parameters()
    evolve(model[0].weight, zeta=0.5, seed=3)
    model.float().cpu()  # nothing moves
    assert follows(model) and addresses(model) == places
    model.load_state_dict(other.state_dict(), assign=True)
    assert follows(model)
    model.double()
    assert follows(model) and model[0].values.dtype == torch.float64
    model.to("meta")
    assert model[0].resident_operands is None


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoints_follow_when_they_are_loaded(tmp_path):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    model, other = build(), build()
    make_operands_resident_(model)
    with torch.no_grad():
        other[0].values.mul_(2)
    dcp.save({"model": other.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)  # writes to the very tensors
    with pytest.raises(RuntimeError, match="refresh_operands_"):
        model[0].require_fresh_operands()
    model.load_state_dict(state["model"])
    assert follows(model) and torch.equal(model[0].values, other[0].values)


# --- writers that do not


WRITES = {
    "values": lambda layer: layer.values.detach().mul_(2),
    "ids": lambda layer: layer.ids.copy_(layer.ids.flip(0)),
    "another tensor": lambda layer: setattr(layer.values, "data", layer.values.detach().clone()),
    "a fused optimizer": lambda layer: torch.optim.AdamW([layer.values], lr=0.1, fused=True).step(),
}


@pytest.mark.parametrize("what", WRITES)
def test_a_foreign_write_is_an_error_until_it_is_told(what):
    model = build()
    optimizer = FusedAdamW(model.parameters(), lr=1e-2, model=model, resident_operands=DTYPE)
    evolver = TopologyEvolver(model, optimizer, TopologySchedule(10, interval=1))
    draw_gradients(model, 0)
    before = copy.deepcopy([*model.state_dict().values()])
    WRITES[what](model[2])
    written = copy.deepcopy([*model.state_dict().values()])
    for use in (lambda: model[2].weight.operands(DTYPE), optimizer.step, evolver.step):
        with pytest.raises(RuntimeError, match=r"chts_train\.refresh_operands_\(model\)"):
            use()
    assert evolver.step_count == 0
    assert all(torch.equal(a, b) for a, b in zip(written, model.state_dict().values(), strict=True)), "something was written"
    assert what == "another tensor" or any(not torch.equal(a, b) for a, b in zip(before, written, strict=True))
    model[0].weight.operands(DTYPE)  # the other layer was not touched
    refresh_operands_(model)
    assert follows(model)
    optimizer.step()
    assert follows(model) and not evolver.step() and follows(model)


def test_optimizers_of_other_parameters_do_not_matter():
    model, other = build(), build()
    FusedAdamW(model.parameters(), model=model, resident_operands=DTYPE)
    second = FusedAdamW(other.parameters(), model=other, resident_operands=DTYPE)
    draw_gradients(other, 0)
    second.step()
    biases = torch.optim.SGD([layer.bias for layer in sparse_layers(model).values()], lr=0.1)
    draw_gradients(model, 0)
    biases.step()
    assert follows(model) and follows(other)


def test_copies_are_not_resident_and_passes_in_another_dtype_are_refused():
    model = build()
    make_operands_resident_(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin[0].resident_operands is None and follows(model)
    with pytest.raises(RuntimeError, match=r"resident in torch\.bfloat16 for this weight, got torch\.float16"):
        model[0].weight.operands(torch.float16)
    assert make_operands_resident_(model, torch.float16) == 2
    model[0].weight.operands(torch.float16)
    assert make_operands_resident_(model, None) == 0
    model[0].weight.operands(DTYPE)


def test_errors_name_the_rule_and_change_nothing():
    model = build()
    model[2].keep_operands = False
    with pytest.raises(ValueError, match="2: resident_operands: must be None for a layer with keep_operands = False"):
        make_operands_resident_(model)
    assert model[0].resident_operands is None
    with pytest.raises(ValueError, match=r"resident_operands: must be torch\.bfloat16, torch\.float16 or None, got torch\.float32"):
        make_operands_resident_(build(), torch.float32)
    with pytest.raises(ValueError, match="must be None on the meta device"):
        make_operands_resident_(build().to("meta"))
    managed = build()
    managed[0]._is_fsdp_managed_module = True
    with pytest.raises(ValueError, match="0: resident_operands: must be None under FSDP"):
        FusedAdamW(managed.parameters(), model=managed, resident_operands=DTYPE)
    with pytest.raises(ValueError, match="model: must be given with resident_operands, got None"):
        FusedAdamW(model.parameters(), resident_operands=DTYPE)
    with pytest.raises(ValueError, match="at least one SparseLinear to refresh, got none"):
        refresh_operands_(nn.Linear(4, 4))
    assert make_operands_resident_(build(impl="reference")) == 0
    tied = nn.Sequential(SparseLinear(16, 16), SparseLinear(16, 16))
    tied[1].values = tied[0].values
    with pytest.raises(ValueError, match=r"got 0\.values is 1\.values"):
        make_operands_resident_(tied)


# --- compiled passes


@pytest.mark.parametrize("mode", ("training", "no_grad"))
def test_compiled_passes_read_the_operands_and_never_pack(packed, mode):
    model = build(impl="operand_reader")
    optimizer = FusedAdamW(model.parameters(), lr=0.1, model=model, resident_operands=DTYPE)
    evolver = TopologyEvolver(model, optimizer, SCHEDULE)
    torch._dynamo.reset()
    network = torch.compile(lambda x: model(x).float().square().mean(), fullgraph=True, dynamic=True, backend="aot_eager")

    def check(what: str) -> None:
        x = torch.randn(6, 16, dtype=DTYPE, requires_grad=True)
        packed.clear()
        if mode == "no_grad":
            with torch.no_grad():
                loss = network(x)
        else:
            loss = network(x)
            ours = torch.autograd.grad(loss, (x, *model.parameters()))
        assert packed == [], what
        y = x
        for layer in model:
            y = layer(y) if not isinstance(layer, SparseLinear) else nn.functional.linear(
                y, layer.weight.to_dense().to(DTYPE), layer.bias.to(DTYPE)
            )  # fmt: skip
        plain = y.float().square().mean()
        torch.testing.assert_close(loss, plain, rtol=2e-2, atol=1e-4)
        if mode == "training":
            [expected] = torch.autograd.grad(plain, x)
            assert (ours[0] - expected).float().norm() <= 3e-2 * expected.float().norm(), what

    check("the first step")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(4):
            draw_gradients(model, step)
            if evolver.step():
                optimizer.step()
            check(f"step {step}")
        model.load_state_dict(build().state_dict())
        check("load_state_dict")
        with torch.no_grad():
            model[0].values.mul_(2)
        refresh_operands_(model)
        check("refresh_operands_")
    assert evolver.updates == 2


def test_what_a_compiled_graph_takes_for_inputs(packed, recorder):
    """The buffers themselves, whose addresses CUDA graphs of the compiler may rely on; one graph for layers of one shape."""
    from torch._dynamo.utils import counters

    backend, nodes = recorder
    layers = [SparseLinear(24, 16) for _ in range(3)]
    for layer in layers:
        layer.impl, layer.resident_operands = "operand_reader", DTYPE
    torch._dynamo.reset()
    counters.clear()
    network = torch.compile(lambda layer, x: layer(x), fullgraph=True, backend=backend)
    for layer in layers:
        network(layer, torch.randn(3, 24, dtype=DTYPE, requires_grad=True)).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1
    products = [node for node in nodes if "chts." in str(node.target)]
    assert [str(node.target) for node in products] == [f"chts.{n}.default" for n in ("spmm", "input_grad", "weight_grad")]
    for node in products[:2]:
        assert [argument.op for argument in (*node.args[1:3], *node.args[-2:])] == ["placeholder"] * 4


def test_where_resident_operands_do_not_fit_a_compiled_pass_packs(packed):
    layer = SparseLinear(16, 16)
    layer.impl, layer.resident_operands = "operand_reader", torch.float16
    twice = {"values": nn.Parameter(2 * layer.values.detach()), "ids": layer.ids, "bias": layer.bias}
    calls = {
        "another dtype": lambda x: layer(x),
        "other values": lambda x: torch.func.functional_call(layer, twice, (x.half(),)),
    }
    x = torch.randn(5, 16, dtype=DTYPE)
    for (what, call), factor in zip(calls.items(), (1, 2), strict=True):
        torch._dynamo.reset()
        packed.clear()
        y = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
        assert packed == ["pack"], what
        expected = x.float() @ (factor * layer.weight.to_dense()).t() + layer.bias
        torch.testing.assert_close(y.float(), expected, rtol=3e-2, atol=3e-2)


# --- on a GPU


def captured_training(resident: bool, compiled: str | None, n: int = 2, width: int = 128, lr: float = 1e-3):
    """Three rounds of replays of a captured training step, with a topology update, a state dict loaded and a write of our own in
    between. Yields (what came last, model, loss)."""
    model = build(n, width).cuda()
    options = {"resident_operands": DTYPE} if resident else {}
    optimizer = FusedAdamW(model.parameters(), lr=lr, model=model, capturable=True, **options)
    evolver = TopologyEvolver(model, optimizer, TopologySchedule(100, interval=1, stop_fraction=1.0, zeta=0.3, lr_ramp_steps=0), seed=5)
    network = model if compiled is None else torch.compile(model, fullgraph=True, dynamic=False, backend=compiled)
    draw = torch.Generator().manual_seed(1)
    batches = [torch.randn(64, width, generator=draw).cuda() for _ in range(12)]
    x = batches[0].clone()

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", DTYPE, cache_enabled=False):
            loss = network(x).float().square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        loss = step()

    def replays(some: list[torch.Tensor]) -> torch.Tensor:
        for batch in some:
            x.copy_(batch)
            graph.replay()
        return loss

    yield "replays", model, replays(batches[:3])
    assert not evolver.step()
    yield "a topology update", model, loss
    yield "replays after the update", model, replays(batches[3:6])
    with torch.no_grad():
        state = {name: t.mul(0.5) if t.is_floating_point() else t.flip(0) for name, t in model.state_dict().items()}
    model.load_state_dict(state)
    yield "load_state_dict", model, loss
    yield "replays after load_state_dict", model, replays(batches[6:9])
    with torch.no_grad():
        model[0].values.mul_(1.5)
    refresh_operands_(model)
    yield "a write", model, loss
    yield "replays after the write", model, replays(batches[9:])
    x.copy_(batches[0])
    yield "an eager step", model, step()  # Python runs, and finds everything in order


@pytest.mark.gpu
@pytest.mark.parametrize("n", (1, 2))
@pytest.mark.parametrize("compiled", (None, "aot_eager"))
def test_captured_training_is_that_without_resident_operands_bit_for_bit(compiled, n):
    torch._dynamo.reset()
    plain = [(copy.deepcopy(m.state_dict()), float(loss)) for _, m, loss in captured_training(False, compiled, n)]
    torch._dynamo.reset()
    steps = captured_training(True, compiled, n)
    places = None
    for (what, model, loss), (expected, expected_loss) in zip(steps, plain, strict=True):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected[name]), (what, name)
        assert float(loss) == expected_loss, what
        assert follows(model), what
        places = places or addresses(model)
        assert addresses(model) == places, what


@pytest.mark.gpu
def test_captured_training_of_inductor_code_follows_the_plain_one():
    results = []
    with torch._inductor.config.patch(compile_threads=4):
        for resident in (False, True):
            torch._dynamo.reset()
            for what, model, _ in captured_training(resident, "inductor", lr=1e-4):
                assert not resident or follows(model), what
            results.append([p.detach().clone() for p in model.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=4e-3)  # of 13 steps of at most 1e-4 each


@pytest.mark.gpu
def test_graphs_of_the_compiler_read_the_operands_where_they_are():
    """mode="reduce-overhead": inputs that are not known to stay where they are would be copied at every call."""
    torch._dynamo.reset()
    model = build(width=128).cuda()
    optimizer = FusedAdamW(model.parameters(), lr=1e-3, model=model, resident_operands=DTYPE)
    evolver = TopologyEvolver(model, optimizer, SCHEDULE, seed=5)
    with torch._inductor.config.patch(compile_threads=4):
        network = torch.compile(model, fullgraph=True, dynamic=False, mode="reduce-overhead")
        for number in range(8):
            x = torch.randn(64, 128, device="cuda")
            torch.compiler.cudagraph_mark_step_begin()
            with torch.autocast("cuda", DTYPE):
                network(x).float().square().mean().backward()
                expected = torch.autograd.grad(model(x).float().square().mean(), list(model.parameters()))
            for p, grad in zip(model.parameters(), expected, strict=True):
                assert (p.grad - grad).norm() <= 0.1 * grad.norm(), number  # fused casts round less
            if evolver.step():
                optimizer.step()
            assert follows(model)
            optimizer.zero_grad()
    assert evolver.updates == 4


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", (None, "aot_eager", "inductor"))
def test_a_step_of_a_capture_packs_nothing(compiled):
    from torch.profiler import ProfilerActivity, profile

    model = build(width=128).cuda()
    optimizer = FusedAdamW(model.parameters(), lr=1e-3, model=model, capturable=True, resident_operands=DTYPE)
    torch._dynamo.reset()
    network = model if compiled is None else torch.compile(model, fullgraph=True, dynamic=False, backend=compiled)
    x = torch.randn(64, 128, device="cuda")

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", DTYPE, cache_enabled=False):
            network(x).float().square().mean().backward()
        optimizer.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    graph.replay()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
        graph.replay()
        torch.cuda.synchronize()
    names = [event.key for event in seen.key_averages()]
    assert any("adamw_kernel" in name for name in names) and not [name for name in names if "pack_operands" in name], names


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_captures_do_not_own_resident_operands():
    model = build(width=128).cuda()
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(RuntimeError, match="outside of CUDA graph captures"):
        make_operands_resident_(model)
    assert model[0].resident_operands is None


@pytest.mark.parametrize("moment_dtype", (None, torch.bfloat16))
def test_the_optimizer_follows_a_layer_that_is_told_to_use_the_reference_later(moment_dtype):
    model = build()
    optimizer = FusedAdamW(model.parameters(), lr=1e-2, model=model, resident_operands=DTYPE, moment_dtype=moment_dtype)
    model[0].impl = "reference"
    for step in range(3):
        draw_gradients(model, step)
        optimizer.step()
        assert follows(model)


def test_inference_tensors_have_no_resident_operands():
    with torch.inference_mode():
        layer = SparseLinear(16, 16)
    with pytest.raises(RuntimeError, match="^values: must not be made in inference mode"):
        layer.resident_operands = DTYPE
    assert layer.resident_operands is None
