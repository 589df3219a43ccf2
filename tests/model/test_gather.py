import os
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from wealy_ray.model.gather import gather_with_gradient
from wealy_ray.model.losses.build import NTXentSettings, TripletSettings, build_loss

ROWS, INPUTS = 14, 6
CLIQUES = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 5])


def problem():
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Linear(INPUTS, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return network, torch.randn(ROWS, INPUTS, generator=generator, dtype=torch.float64)


def one_process(settings):
    network, x = problem()
    loss = build_loss(settings)(network(x), CLIQUES, None)
    loss.backward()
    return [loss.detach(), *(p.grad for p in network.parameters())]


def work(rank, sizes, settings, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(sizes))
    network, x = problem()
    model = nn.parallel.DistributedDataParallel(network)
    first = sum(sizes[:rank])
    z = gather_with_gradient(model(x[first : first + sizes[rank]]), sizes)
    loss = build_loss(settings)(z, CLIQUES, torch.arange(first, first + sizes[rank]))
    (loss * len(sizes)).backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    torch.save([total, *(p.grad for p in network.parameters())], os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.parametrize("sizes", [(7, 7), (5, 9), (4, 3, 2, 5)])
@pytest.mark.parametrize(
    "settings", [NTXentSettings(), TripletSettings(choice="hardest")], ids=lambda s: s.kind
)
def test_ranks_add_up_to_one_process(sizes, settings):
    if len(sizes) == 4 and settings.kind == "triplet":
        pytest.skip("one loss on four ranks is enough")
    expected = one_process(settings)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (sizes, settings, folder), nprocs=len(sizes))
        for rank in range(len(sizes)):
            found = torch.load(os.path.join(folder, f"{rank}.pt"))
            for ours, theirs in zip(found, expected, strict=True):
                assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


def test_one_rank_needs_no_group():
    z = torch.randn(3, 2)
    assert gather_with_gradient(z, [3]) is z
