# SPDX-License-Identifier: MIT-0
"""Scatter/gather over the tensor-parallel group: exact, and 1/t of every message."""

import math
from functools import lru_cache, partial

import pipeline as pl
import pytest
import ranks
import scripts
import torch
import torch.distributed as dist
import wire_cut
from megatron_tp import Counter
from proof import assert_equal

SHAPES = [("gpipe", 1), ("1f1b", 1), ("interleaved", 1), ("interleaved", 2)]


@lru_cache
def meshes():
    return wire_cut.make_meshes(ranks.device)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("kind, chunks", SHAPES)
def test_scatter_gather(kind, chunks):
    """2 stages × 2 ranks that hold the same: each sends half of every boundary tensor."""
    mesh, tp_group = meshes()
    sizes = dict(vocab_size=61, seq_length=16, hidden_size=16, num_heads=2)
    config = pl.GPTConfig(num_layers=2 * chunks + 1, **sizes)
    generator = torch.Generator().manual_seed(1)
    tokens_BS, targets_BS = torch.randint(61, (2, 9, 13), generator=generator).to(ranks.device)
    targets_BS[0, 3:] = -100
    plain = pl.GPT(config).to(ranks.device, torch.float64)
    expected = plain.loss(tokens_BS, targets_BS).sum() / (targets_BS != -100).sum()
    expected.backward()
    stage = pl.PipelineStage(config, mesh.pp_rank, 2, chunks).to(ranks.device, torch.float64)
    program = pl.programs(pl.schedule(kind, 2, 4, chunks))[mesh.pp_rank]
    make_mailbox = partial(wire_cut.WireCutMailbox, tp_group)
    with Counter() as counter:
        loss = pl.run_step(stage, program, tokens_BS, targets_BS, mesh, make_mailbox=make_mailbox)
    assert_equal({"loss": loss}, {"loss": expected})
    grads = {name: p.grad for name, p in stage.named_parameters()}
    full = pl.gather_state_dict(grads, config, mesh.pp_group)
    assert_equal(full, {name: p.grad for name, p in plain.named_parameters()})
    boundaries = (chunks - (mesh.pp_rank == 1)) + (chunks - (mesh.pp_rank == 0))
    full_bytes = sum(x.numel() * 16 * 8 for x in tokens_BS.tensor_split(4)) * boundaries
    assert sum(m.bytes for m in counter.messages if m.op == "send") * 2 == full_bytes


@pytest.mark.ranks(2, 4)
def test_parts_on_the_wire_join_again():
    """Any number of elements, also one that does not divide."""
    for shape in ((3, 5), (1,), (2, 3, 4)):
        x = torch.arange(math.prod(shape), dtype=torch.float64).view(shape).to(ranks.device)
        part = wire_cut.cut_for_wire(x, dist.group.WORLD)
        assert part.numel() == -(-x.numel() // dist.get_world_size())
        assert torch.equal(wire_cut.join_from_wire(part, shape, dist.group.WORLD), x)


def test_one_rank_sends_the_tensor():
    x = torch.arange(6.0).view(2, 3)
    part = wire_cut.cut_for_wire(x)
    assert part.shape == (6,)
    assert torch.equal(wire_cut.join_from_wire(part, (2, 3)), x)


@lru_cache
def group_of_rank_0():
    return dist.new_group([0])


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", ["cut", "join"])
def test_a_group_of_other_ranks_is_refused(name):
    group = group_of_rank_0()
    if dist.get_rank() == 0:
        return
    with pytest.raises(ValueError, match="rank 1 is not in the process group"):
        if name == "cut":
            wire_cut.cut_for_wire(torch.ones(3), group)
        else:
            wire_cut.join_from_wire(torch.ones(3), (3,), group)


@pytest.mark.slow
def test_the_command():
    done = scripts.forked(wire_cut.__file__, "--ranks", "2")
    assert done.returncode == 0, done.stderr
    assert "equal  True  ok" in done.stdout


@pytest.mark.ranks(4)
def test_the_command_on_four_ranks():
    code, printed = scripts.on_ranks(wire_cut)
    assert code == 0 and "equal  True  ok" in printed


def test_a_wrong_flag_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [wire_cut.__file__, "--ranks", "3"])
    with pytest.raises(SystemExit, match="2"):
        wire_cut.flags()
    assert "two stages need an even number" in capsys.readouterr().err.splitlines()[-1]
