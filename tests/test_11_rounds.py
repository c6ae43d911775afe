# SPDX-License-Identifier: MIT-0
"""Chapter 11's rounds: the reward model, its loss, sampling, pairs, and the loop on ranks."""

import argparse

import preference as pf
import pytest
import ranks
import rounds as rd
import scripts
import torch
import torch.distributed as dist
from proof import Shows, assert_differs, assert_equal, plant, worst_of
from test_11_preference import (
    EVERY_WORLD,
    config,
    cpu,
    edited,
    examples,
    flags_of,
    gpt,
    grads_of,
    judged,
    normal,
    parallel_gpt,
)


def reward_model(trunk, seed=3):
    """With a head that is not zero."""
    model = rd.RewardModel(trunk).to(ranks.device, torch.float64)
    with torch.no_grad():
        model.head.weight.copy_(normal(5, 64, seed=seed))
        model.head.bias.copy_(normal(5, seed=seed))
    return model


def labels(count: int):
    generator = torch.Generator().manual_seed(4)
    found = torch.randint(5, (count, 5), generator=generator)
    found[0, 1] = found[2] = -100
    return found.to(ranks.device)


def by_hand(model, found):
    """Each response by itself, in a row without padding: the head on the last hidden state."""
    rows = []
    for prompt, response in found:
        x_1SH = model.trunk.hidden(torch.tensor([prompt + response], device=ranks.device))
        rows.append(model.head(x_1SH[0, -1]))
    return torch.stack(rows)


@EVERY_WORLD
def test_the_reward_model_reads_the_end_token():
    """Padded and packed; values and every gradient of the masked regression, on tp ranks."""
    found, labels_R5 = examples(7), labels(7)
    plain = reward_model(gpt())
    errors = (by_hand(plain, found) - labels_R5)[labels_R5 != -100]
    expected = errors.square().mean()
    expected.backward()
    for row_length in (None, 30):
        model = reward_model(parallel_gpt())
        batch = pf.collate(found, row_length).to(ranks.device)
        rewards_R5 = model(batch)
        assert_equal({"": rewards_R5}, {"": by_hand(plain, found)}, 1e-12)
        loss = rd.helpsteer_loss(rewards_R5, labels_R5)
        loss.backward()
        assert_equal({"loss": loss}, {"loss": expected}, 1e-12)
        merged = pf.gather_state_dict(grads_of(model), config())
        assert_equal(merged, cpu(grads_of(plain)), 1e-11)


@pytest.mark.ranks(2)
def test_labels_count_once_over_micro_batches_and_replicas():
    found, labels_R5 = examples(7), labels(7)
    plain = reward_model(gpt())
    loss = rd.helpsteer_loss(plain(pf.collate(found).to(ranks.device)), labels_R5)
    loss.backward()
    mesh = pf.make_mesh(1, ranks.device)
    model = reward_model(parallel_gpt(mesh.tp_group))
    cuts = ([0, 1], [1, 2], [2, 7])
    mine = cuts[:2] if mesh.dp_rank == 0 else cuts[2:]
    micro = [(pf.collate(found[a:b]).to(ranks.device), labels_R5[a:b]) for a, b in mine]
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    ((found_loss, _),) = pf.train(model, optimizer, [micro], rd.reward_objective, mesh, 1e9)
    assert_equal({"": found_loss}, {"": loss}, 1e-12)
    assert_equal(
        pf.gather_state_dict(grads_of(model), config(), mesh.tp_group), cpu(grads_of(plain)), 1e-11
    )


def test_the_loss_and_the_published_weights():
    rewards = torch.tensor([[1.0, 2, 3, 4, 0], [0, 0, 0, 0, 4]])
    found = rd.helpsteer_loss(rewards, torch.tensor([[1, 4, -100, -100, 0], [-100] * 5]))
    assert found == 4 / 3
    assert rd.helpsteer_loss(rewards, torch.full((2, 5), -100)) == 0
    scalars = rd.scalar_reward(rewards)
    assert torch.allclose(scalars, torch.tensor([0.3 + 1.48 + 1.38 + 1.88, -1.32]))
    with pytest.raises(ValueError, match=r"rewards \(2, 5\) and labels \(2, 4\)"):
        rd.helpsteer_loss(rewards, torch.zeros(2, 4))
    fresh = rd.RewardModel(gpt()).double()(pf.collate(examples(3)))
    assert fresh.shape == (3, 5) and fresh.eq(0).all()


def test_pairs_of_samples():
    four = [([1, 10], [i, 11]) for i in range(4)]
    assert rd.best_and_worst(four, [0.5, 0.9, 0.1, 0.9]) == [(four[1], four[2], 0.8)]
    assert rd.best_and_worst(four, [0.5] * 4) == []
    assert rd.paired(four * 2, [1.0, 1, 1, 1, 0, 0, 1, 0]) == [(four[2], four[0], 1.0)]
    assert rd.agreement([1.0, 0, 0, 0, 1, 1, 1, 1], [3.0, 1, 2, 0, 1, 2, 3, 4]) == [1.0]
    prompt = [3, 1, 2, 10]
    assert rd.verify(prompt, [1, 2, 3, 11]) == 1 and rd.verify(prompt, [1, 3, 2, 11]) == 0.5
    assert rd.verify(prompt, [1, 2, 3, 11, 5]) == 0.8 and rd.verify(prompt, [1, 2, 3]) == 0.75
    assert rd.marks(prompt, [1, 2, 3, 11]) == [4, 4, 4, -100, 0]


@EVERY_WORLD
def test_sampling():
    """Equal tokens on all tp ranks, with the frequencies of the single device's probabilities."""
    model = parallel_gpt()
    prompts = torch.tensor([[3, 1, 10]], device=ranks.device).expand(4000, 3)
    generator = torch.Generator(ranks.device).manual_seed(1)
    found = rd.sample(model, prompts, 1, generator)
    everyone = [torch.empty_like(found) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, found.contiguous())
    assert all(torch.equal(x, found) for x in everyone)
    p = gpt()(prompts[:1])[0, -1].softmax(-1)
    counts = torch.bincount(found.flatten(), minlength=13) / 4000
    assert (counts - p).abs().max() < 0.04
    longer = rd.sample(model, prompts[:3], 5, generator)
    assert longer.shape == (3, 5)


@pytest.mark.ranks(2)
def test_the_rounds_on_two_ranks():
    sizes = ("--steps", 3, "--pairs", 4, "--rounds", 2, "--pair-steps", 2, "--reward-steps", 2)
    for tp, judge in ((1, "verifier"), (2, "model")):
        code, printed = scripts.on_ranks(rd, *sizes, "--tp", tp, "--judge", judge)
        assert code == 0 and printed.count("a short run") == 2, printed


@pytest.mark.ranks(2)
def test_what_the_rounds_learn_from():
    """In bf16 the first Δ is 0 to the bit. A replica without pairs adds none of its own."""
    seen = []

    def watched(policy, pairs, *others):
        seen.append(pairs)
        if pairs:
            with torch.autocast(ranks.device.type, torch.bfloat16), torch.no_grad():
                now_R = pf.sequence_log_probs(policy, pairs.sequences)
            assert torch.equal(now_R, pairs.reference_R)
        return learn(policy, pairs, *others)

    def on_rank_0(found, rewards):
        return [] if dist.get_rank() else best_and_worst(found, rewards)

    sizes = ("--steps", 3, "--pairs", 16, "--rounds", 1, "--pair-steps", 2, "--reward-steps", 2)
    with plant(rd, "best_and_worst", on_rank_0) as best_and_worst:
        with plant(rd, "learn", watched) as learn:
            code, printed = scripts.on_ranks(rd, *sizes, "--dtype", "bf16")
    assert code == 0, printed
    assert len(seen) == 1 and (seen[0] is None) == (dist.get_rank() == 1)


@pytest.mark.ranks(2)
def test_learning_where_a_replica_has_no_pairs():
    """The means are those of the other replica's pairs, as if both had them."""
    mesh = pf.make_mesh(1, ranks.device)
    args = argparse.Namespace(pair_lr=1e-3, pair_steps=2, dtype="fp64")
    objective = pf.PreferenceObjective("rpo", sft_weight=0.1)
    pairs = pf.pair_batch(judged(3), gpt(), ranks.device)
    results = []
    for mine in (pairs, None if mesh.dp_rank else pairs):
        policy = parallel_gpt(mesh.tp_group, seed=5)
        found = pf.learn(policy, mine, objective, args, mesh)
        numbers = torch.tensor([found.first_loss, found.chosen, found.rejected, found.gap, found.h])
        weights = pf.gather_state_dict(policy.state_dict(), config(), mesh.tp_group)
        results.append({"numbers": numbers.double(), **weights})
    assert_equal(results[1], results[0], 1e-6)


@pytest.mark.ranks(2)
def test_a_mean_over_replicas_where_one_has_no_values():
    mesh = pf.make_mesh(1, ranks.device)
    replica = rd.Replica(None, mesh, ranks.device)
    assert replica.mean([] if mesh.dp_rank else [1.0, 0.5]) == 0.75
    assert replica.mean([]) == 0


@pytest.mark.slow
@pytest.mark.ranks(2, timeout=280)
def test_the_script():
    """With its own number of steps."""
    code, printed = scripts.on_ranks(rd)
    assert code == 0 and "FAILED" not in printed and printed.count(" ok\n") == 2, printed


@pytest.mark.slow
def test_a_plain_start():
    sizes = ("--steps", "1", "--pairs", "4", "--rounds", "1", "--pair-steps", "1")
    done = scripts.forked(rd.__file__, "--ranks", "1", "--reward-steps", "1", *sizes)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("a short run") == 2


def test_check_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["rounds.py", "--check"])
    with pytest.raises(SystemExit):
        rd.flags()
    assert "--check belongs to preference.py" in capsys.readouterr().err
    assert flags_of("--tp", "2").tp == 2


# ── Planted bugs ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.planted_bug(
    symptom="the reward is read at the last position of the row: padding, for shorter responses",
    seen_in="https://github.com/huggingface/transformers/issues/35352",
)
def test_the_reward_is_read_at_padding():
    found = examples(7)
    batch = pf.collate(found)
    model = reward_model(gpt())
    expected = {"rewards": model(batch)}
    S = batch.tokens_BS.shape[1]
    bug = edited_forward("x_BSH.flatten(0, 1)[batch.end_R]", f"x_BSH[:, {S - 1}]")
    with plant(rd.RewardModel, "forward", bug):
        wrong = {"rewards": model(batch)}
    assert_differs(wrong, expected, 0.1)
    return Shows(worst_of(wrong, expected), "wrong with it")


@pytest.mark.planted_bug(
    symptom="the reward is read one token too late, at the first padding",
    seen_in="https://github.com/EleutherAI/gpt-neox/issues/1285",
)
def test_the_reward_is_read_one_token_too_late():
    batch = pf.collate(examples(7))
    model = reward_model(gpt())
    expected = {"rewards": model(batch)}
    last = batch.tokens_BS.numel() - 1
    bug = edited_forward("batch.end_R]", f"(batch.end_R + 1).clamp(max={last})]")
    with plant(rd.RewardModel, "forward", bug):
        wrong = {"rewards": model(batch)}
    assert_differs(wrong, expected, 0.1)
    return Shows(worst_of(wrong, expected), "wrong with it")


def edited_forward(old: str, new: str):
    forward = rd.RewardModel.forward
    return edited(forward, (old, new), at_least_fp32=pf.at_least_fp32)


@pytest.mark.planted_bug(
    symptom="missing labels are read as marks of −100: rewards fall to −100", seen_in=None
)
def test_missing_labels_are_learned():
    rewards, labels_R5 = normal(7, 5), labels(7)
    expected = rd.helpsteer_loss(rewards, labels_R5)
    wrong = (rewards - labels_R5).square().mean()
    assert wrong > 100 * expected
    return Shows((wrong / expected - 1).item(), "wrong with it")
