"""Sharded and data-parallel layers on one GPU: NCCL with one process, gloo with 2, 4 and 8. Run with `pytest -m gpu`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chts_train.jobs import dcp, ddp, fsdp, trainer
from tests.chts_train.jobs.launch import checks, read, require_ok, start

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

PROLOGUE = """
import os, sys
import torch, torch.distributed as dist
from torch import nn
from chts_train import SparseLinear, SparsityConfig, TopologyEvolver, TopologySchedule, sparsify_
from chts_train.distributed import RankCheck, TopologyMismatch, gathered

SCHEDULE = TopologySchedule(total_steps=100, interval=3, stop_fraction=1.0, zeta=0.3, lr_ramp_steps=2)
torch.cuda.set_device(0)

def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128)).cuda()
    sparsify_(model, SparsityConfig(seed=1))
    return model

def batches():
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(64, 128, generator=draw).cuda() for _ in range(8)]

def train(model, network, share=lambda x: x, autocast=True):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)  # the same sums, sharded or not
    evolver = TopologyEvolver(model, optimizer, SCHEDULE, seed=5)
    for x in batches():
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast, cache_enabled=False):
            loss = network(share(x)).float().square().mean()
        loss.backward()
        if evolver.step():
            optimizer.step()
        optimizer.zero_grad()
    assert evolver.updates == 2
    return optimizer, evolver
"""

NCCL = """
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

dist.init_process_group("cpu:gloo,cuda:nccl", init_method="file://" + sys.argv[1], rank=0, world_size=1)
plain = make()
reference = train(plain, plain)[1]

def shard(model, **options):
    for layer in model:
        if isinstance(layer, SparseLinear):
            fully_shard(layer, **options)
    return fully_shard(model, **options)

model = shard(make())
optimizer, evolver = train(model, model)
for name, layer in evolver.layers.items():
    assert torch.equal(layer.ids, reference.layers[name].ids), name
    assert torch.equal(gathered(layer.values), reference.layers[name].values), name
    assert torch.equal(gathered(evolver.ages[name]), reference.ages[name]), name
    assert layer._operands.nbytes == 0, name
print("sharded over nccl")

model = shard(make(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
optimizer, evolver = train(model, model, autocast=False)
for name, layer in evolver.layers.items():
    layer.weight.validate()
    assert layer.values.dtype == torch.float32 and layer._operands.nbytes == 0, name
    # Gradients were rounded to bfloat16, so some links went elsewhere.
    assert (layer.ids != reference.layers[name].ids).float().mean() < 0.5, name
model[0].unshard()
assert model[0].values.dtype == torch.bfloat16
print("gathered in bfloat16")

model = shard(make(), offload_policy=CPUOffloadPolicy())
optimizer, evolver = train(model, model)
for name, layer in evolver.layers.items():
    assert layer.values.to_local().device.type == "cpu" and layer.ids.is_cuda
    assert (layer.ids != reference.layers[name].ids).float().mean() < 0.05, name
evolver.stats()
print("offloaded")

model = make()
network = nn.parallel.DistributedDataParallel(model, device_ids=[0])
optimizer, evolver = train(model, network)
for name, layer in evolver.layers.items():
    assert torch.equal(layer.values, reference.layers[name].values), name
print("ddp")

check = RankCheck()
torch.cuda.synchronize()
torch.cuda.set_sync_debug_mode("error")  # nothing of the comparison waits for the device
check.start({name: layer.ids for name, layer in evolver.layers.items()}, "now")
check.poll()
torch.cuda.set_sync_debug_mode("default")
check.finish()
print("compared without waiting")
"""

GLOO = """
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
model = make()
network = nn.parallel.DistributedDataParallel(model)
optimizer, evolver = train(model, network, lambda x: x.chunk(2)[rank])
halves = make()
own = torch.optim.AdamW(halves.parameters(), lr=1e-2, foreach=False)
alone = TopologyEvolver(halves, own, SCHEDULE, seed=5, verify=False)
for x in batches():
    for part in x.chunk(2):
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = halves(part).float().square().mean() / 2
        loss.backward()
    if alone.step():
        own.step()
    own.zero_grad()
for name, layer in evolver.layers.items():
    assert torch.equal(layer.ids, alone.layers[name].ids), name
    torch.testing.assert_close(layer.values, alone.layers[name].values, rtol=1e-4, atol=1e-5)
model[0].ids[0, 0] = (model[0].ids[0, 0] + rank) % 90
try:
    for _ in range(3):
        evolver.step()
    evolver.state_dict()
    raise SystemExit("not noticed")
except TopologyMismatch as error:
    assert "'0' (rank 1)" in str(error), error
print("two processes on one GPU")
"""


def run(folder: Path, program: str, world: int) -> list[str]:
    script = folder / "program.py"
    script.write_text(PROLOGUE + program + "\nsys.stdout.flush()\nos._exit(0)\n")
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    jobs = [
        subprocess.Popen([sys.executable, script, folder / "store"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         env={**os.environ, "PYTHONPATH": path, "RANK": str(rank)})
        for rank in range(world)
    ]  # fmt: skip
    out = []
    try:
        for job in jobs:
            text, errors = job.communicate(timeout=200)
            assert job.returncode == 0, text + errors[-4000:]
            out.append(text)
    finally:
        for job in jobs:
            job.kill()
    return out


def test_one_process_over_nccl(tmp_path):
    [text] = run(tmp_path, NCCL, 1)
    wanted = ("sharded over nccl", "gathered in bfloat16", "offloaded", "ddp", "compared without waiting")
    assert [line for line in text.splitlines() if line in wanted] == list(wanted), text


def test_two_processes_share_a_gpu(tmp_path):
    assert all("two processes on one GPU" in text for text in run(tmp_path, GLOO, 2))


@pytest.mark.parametrize("world", (4, 8))
@pytest.mark.parametrize("module", (ddp, fsdp, trainer), ids=("ddp", "fsdp", "trainer"))
def test_many_processes_share_a_gpu(tmp_path, text_folder, module, world):
    """What several GPUs run over NCCL (test_nccl_gpu), through the same kernels, where there is only one GPU."""
    (tmp_path / "text").symlink_to(text_folder)
    start(tmp_path, world, checks(module), "cuda:0")
    require_ok(read(tmp_path, world), checks(module))


def test_distributed_checkpoints_change_the_number_of_processes_on_a_gpu(tmp_path):
    for world, names in ((1, ["first_checkpoint"]), *((world, checks(dcp)) for world in (2, 4, 8)), (1, ["back_on_one"])):
        start(tmp_path, world, names, "cuda:0")
        require_ok(read(tmp_path, world), names)
