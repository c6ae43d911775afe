# SPDX-License-Identifier: MIT-0
"""A small use of every function and class that needs others of its chapter, for test_lift.py:
chapter, name, use.

A use gets a module, which is the chapter or a lifted copy, and an empty folder; it returns what it
computed. A shared block's functions stand under its home.
"""

import contextlib
import math
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def through(module: torch.nn.Module, *inputs):
    """What a layer returns in float64, and the gradient of every parameter."""
    out = module.double()(*inputs)
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in module.parameters() if p.grad is not None)]


@contextlib.contextmanager
def alone():
    """A process group of one, for what needs one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield torch.device("cpu")
    finally:
        dist.destroy_process_group()


# ── Chapter 1 ─────────────────────────────────────────────────────────────────────────────────────


def speech_config(**changes):
    from deepspeech import DeepSpeechConfig

    sizes = dict(num_bins=8, convolutions=((2, (3, 3), (1, 2)),), hidden_size=6)
    return DeepSpeechConfig(**(sizes | changes))


def utterances():
    """Two of unequal length, as the fields of a Batch."""
    features_BTF = normal(2, 9, 8)
    features_BTF[1, 7:] = 0
    labels_BU = torch.tensor([[3, 4, 4], [5, 6, 0]])
    return features_BTF, torch.tensor([9, 7]), labels_BU, torch.tensor([3, 2])


def net():
    from deepspeech import parallel_model

    return parallel_model(speech_config()).double()


def spoken():
    return normal(9, 2, 29).log_softmax(-1)


def ring_of(m):
    """GradientRing on its own: what finish() leaves in the gradients."""
    layer = torch.nn.Linear(3, 2).double()
    ring = m.GradientRing(layer.parameters())
    layer(normal(4, 3)).sum().backward()
    ring.finish()
    return [p.grad for p in layer.parameters()]


def speech_gradients(m):
    import deepspeech

    model = net()
    ring = deepspeech.GradientRing(model.parameters())
    loss = m.parallel_gradients(model, deepspeech.Batch(*utterances()), ring)
    return [loss, *(p.grad for p in model.parameters())]


def speech_batches():
    import deepspeech

    return [deepspeech.Batch(*utterances())] * 2


def speech_steps(train):
    """Losses of two steps."""
    from deepspeech import make_optimizer

    model = net()
    return losses(train(model, make_optimizer(model, 1e-3), speech_batches()))


def recorded(folder):
    """A manifest of one recording."""
    import soundfile

    soundfile.write(folder / "a.wav", np.sin(np.arange(16_000)), 16_000)
    line = '{"audio_filepath": "a.wav", "duration": 1.0, "text": "one"}'
    (folder / "a.jsonl").write_text(line, "utf-8")
    return str(folder / "a.jsonl")


def saved_speech(m, folder):
    """save_model and load_model, one of them lifted."""
    import speech

    save = getattr(m, "save_model", None) or speech.save_model
    load = getattr(m, "load_model", None) or speech.load_model
    save(str(folder / "net"), speech.build(speech.SpeechConfig()), ["one two"])
    model, texts = load(str(folder / "net"))
    return model.state_dict(), texts


def counted(m):
    """The messages of one sum, with Counter on its own."""
    with alone(), m.Counter() as counter:
        dist.all_reduce(normal(3))
    return [(message.op, message.bytes) for message in counter.messages]


# ── Chapter 2 ─────────────────────────────────────────────────────────────────────────────────────


class Normless(torch.nn.Identity):
    """Stands in for a norm of so many features."""

    def forward(self, x, valid):
        return x


def sum_so_far(x_TDBH, weight_DHH):
    """Stands in for a recurrence."""
    return (x_TDBH @ weight_DHH).cumsum(0)


class Streams:
    """What a plain layer needs of RandomStreams, for copies that do not have the class."""

    outside = inside = None


TOKENS = torch.arange(12).view(2, 6)


def small():
    """A configuration of chapter 2, from the chapter itself: copies take one as an argument."""
    from megatron_tp import GPTConfig

    return GPTConfig(vocab_size=13, seq_length=8, hidden_size=16, num_layers=2, num_heads=2)


def weights():
    from megatron_tp import initial_weights

    return dict(initial_weights(small()))


def gpt():
    from megatron_tp import ParallelGPT

    return ParallelGPT(small()).double()


def losses(steps) -> list:
    return [x for step in steps for x in step]


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def with_optimizer(model):
    return model, optimizer_of(model)


def mesh_of_one():
    """Of a process without process groups."""
    from megatron_tp import Mesh

    return Mesh()


def places(mesh) -> list:
    return [size for size in vars(mesh).values() if isinstance(size, int)]


def one_mesh(m):
    with alone() as device:
        return places(m.make_mesh(1, device))


def gathered(m):
    with alone():
        return m.gather_state_dict(weights(), small())


def masks(m):
    """Of a dropout module that the lifted function has seeded."""
    from megatron_tp import Dropout

    model = torch.nn.Sequential((getattr(m, "Dropout", None) or Dropout)(0.5))
    m.seed_dropout(model, seed=1, step=2)
    return model(normal(40))


def clipped(m):
    model = torch.nn.Linear(3, 2).double()
    model(normal(4, 3)).sum().backward()
    return m.clip_grad_norm_(model.parameters(), 0.1), [p.grad for p in model.parameters()]


def checkpoint(m, folder):
    """Saves with one of the two functions and loads with the other, whichever was lifted."""
    import megatron_tp
    import pretrain

    model, mesh, settings = gpt(), megatron_tp.Mesh(), {"batch": 4}
    save = getattr(m, "save_checkpoint", None) or pretrain.save_checkpoint
    save(folder / "run", 3, model, optimizer_of(model), mesh, settings)
    other = gpt()
    with torch.no_grad():
        [p.zero_() for p in other.parameters()]
    load = getattr(m, "load_checkpoint", None) or pretrain.load_checkpoint
    step = load(folder / "run", other, optimizer_of(other), mesh, settings)
    return step, pretrain.read_run(folder / "run")["id"], other.state_dict()


def run_of(m, folder):
    """The metadata of a checkpoint."""
    import pretrain

    checkpoint(pretrain, folder)
    return list(m.read_run(folder / "run").items())


def merges(m, folder):
    """A tokenizer of 256 bytes and one merge, from files as GPT-2's."""
    import json

    letters = [chr(b) for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    letters += [chr(256 + i) for i in range(256 - len(letters))]
    (folder / "vocab.json").write_text(
        json.dumps({x: i for i, x in enumerate([*letters, "th"])}), "utf-8"
    )
    (folder / "merges.txt").write_text("#version: 0.2\nt h\n", "utf-8")
    return m.folder_tokenizer(folder).encode("with the")


def published(m, folder):
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = GPT2Config(vocab_size=13, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(settings).save_pretrained(folder)
    return m.load_gpt2(folder)[1]


def state_of_run(m):
    model = gpt()
    return m.run_state(model, optimizer_of(model))


class Sublayer(torch.nn.Linear):
    """Stands in for attention and for the feed-forward layer."""

    def __init__(self):
        super().__init__(16, 16)

    def forward(self, x, streams):
        return super().forward(x)


def one_grid(m, folder):
    with alone() as device:
        grid = m.make_grid(1, device)
    return [
        size
        for size in getattr(grid, "_asdict", lambda: vars(grid))().values()
        if isinstance(size, int)
    ]


def text_of(m, folder):
    """A batch of a text of one's own."""
    (folder / "mine.txt").write_text("It was a bright cold day in April. " * 20, "utf-8")
    return m.TextData(str(folder / "mine.txt"), 8).batch(0, 2, seed=0)


# ── Chapter 3 ─────────────────────────────────────────────────────────────────────────────────────


def lists(kind="1f1b", p=2, m=4, v=1):
    import pipeline

    return pipeline.schedule(kind, p, m, v)


def one_device():
    from pipeline import Mesh

    return Mesh()


def stage_of():
    import pipeline

    return pipeline.PipelineStage(pipeline_size()).double()


def pipeline_size():
    from pipeline import GPTConfig

    return GPTConfig(vocab_size=13, num_layers=2, hidden_size=16, num_heads=2, seq_length=8)


def pipeline_gpt():
    from pipeline import GPT

    return GPT(pipeline_size()).double()


def pipeline_step(m):
    import pipeline

    stage = stage_of()
    program = pipeline.programs(lists(p=1, m=2))[0]
    loss = m.run_step(stage, program, *BATCHES[0], one_device())
    return loss, [p.grad for p in stage.parameters()]


def pipeline_executor(m):
    """One forward and its backward."""
    import pipeline

    stage = stage_of()
    mailbox = pipeline.Mailbox(one_device(), [], torch.float64, "cpu")
    tokens_BS, targets_BS = BATCHES[0]
    executor = m.Executor(stage, mailbox, (tokens_BS,), (targets_BS,), torch.tensor(10))
    executor.forward(pipeline.Op("F", 0, 0), None)
    executor.backward(pipeline.Op("B", 0, 0), None)
    return executor.loss, [p.grad for p in stage.parameters()]


def with_ones():
    stage = stage_of()
    for p in stage.parameters():
        p.grad = torch.ones_like(p)
    return stage


def pipeline_train(m):
    stage = stage_of()
    optimizer = torch.optim.SGD(stage.parameters(), 0.1)
    table = lists(p=1, m=2)
    return losses(m.train(stage, optimizer, table, BATCHES, one_device()))


def simulated():
    import pipeline

    return pipeline.simulate(lists())


# ── Chapter 4 ─────────────────────────────────────────────────────────────────────────────────────


def sp_config():
    from seq_parallel import GPTConfig

    return GPTConfig(vocab_size=13, seq_length=8, hidden_size=16, num_layers=2, num_heads=2)


def sp_gpt():
    from seq_parallel import SequenceParallelGPT

    return SequenceParallelGPT(sp_config()).double()


def sp_attention(m):
    from seq_parallel import unfused_attention

    layer = m.Attention(sp_config(), torch.nn.Linear, torch.nn.Linear, unfused_attention)
    return through(layer, normal(5, 2, 16))


def sp_recomputed(m):
    from seq_parallel import unfused_attention

    qkv = normal(3, 3, 4, 5, 2).requires_grad_()
    return m.recomputed_core(unfused_attention, *qkv[0], no_dropout())


def no_dropout():
    from seq_parallel import Dropout

    return Dropout(0.0)


def marked(m):
    layer = torch.nn.LayerNorm(3)
    m.mark(layer.parameters(), True)
    return [p.sequence_parallel for p in layer.parameters()]


def cost_of_layer(m):
    with alone() as device:
        return list(m.layer_cost("selective", device)[:2])


# ── Chapter 5 ─────────────────────────────────────────────────────────────────────────────────────


def hybrid_config(**changes):
    from mamba_hybrid import HybridConfig

    sizes = dict(
        vocab_size=13,
        hidden_size=16,
        pattern="M*-",
        ffn_hidden_size=24,
        mamba_heads=4,
        mamba_head_size=4,
    )
    sizes |= dict(
        mamba_groups=2, state_size=5, attention_heads=4, attention_groups=2, attention_head_size=4
    )
    return HybridConfig(**(sizes | changes))


def scan_arguments():
    """X, a, B, C of seven tokens, four heads in two groups."""
    return normal(2, 7, 4, 3), -torch.rand(2, 7, 4).double(), *normal(2, 2, 7, 2, 5)


def hybrid_model():
    from mamba_hybrid import ParallelHybridLM

    return ParallelHybridLM(hybrid_config()).double()


def hybrid_weights():
    return hybrid_model().state_dict()


def hybrid_gradients():
    model = hybrid_model()
    model.loss(TOKENS, TOKENS).sum().backward()
    return model


def mesh_model():
    from context_parallel import MeshHybridLM

    return MeshHybridLM(hybrid_config(), hybrid_mesh()).double()


def mesh_gradients():
    model = mesh_model()
    model.loss(TOKENS, TOKENS).sum().backward()
    return model


def hybrid_reduced(m):
    model = mesh_gradients()
    m.reduce_gradients(model)
    return [p.grad for p in model.parameters()]


def sharded_span():
    from context_parallel import ShardedSpan

    return ShardedSpan(lengths=[5])


def summed(m):
    x = normal(3)
    m.sum_over([x], None)
    return [x]


def group_copies(m):
    """A parameter of one group with copies for two ranks, and without them again."""
    config = hybrid_config(mamba_groups=1, attention_groups=1)
    full = normal(5 + 5 + 16, 4)
    copied = m.copy_groups("layers.0.mixer.conv_weight", full, config, 2)
    return [copied, m.drop_copies("layers.0.mixer.conv_weight", copied, config, 2)]


def hybrid_folder(folder):
    from test_05_load_nemotron_h import published_folder

    published_folder(folder, sharded=False)
    return folder


def published_hybrid(m, folder):
    return m.load_nemotron_h(hybrid_folder(folder))[1]


def hybrid_mesh():
    from context_parallel import Mesh

    return Mesh(1, 1, 0, 0, None, None)


def one_hybrid_mesh(m):
    with alone() as device:
        mesh = m.make_mesh(1, device)
    return [mesh.tp, mesh.cp, mesh.tp_rank, mesh.cp_rank]


def admitted(m):
    """What a lifted Cache says of the tokens that it admits."""
    return [m.Cache(8, []).admit(TOKENS, TOKENS > 3)]


# ── Chapter 6 ─────────────────────────────────────────────────────────────────────────────────────


def moe_config(**changes):
    from moe_fp8 import MoEConfig

    sizes = dict(vocab_size=13, hidden_size=16, expert_size=8, shared_size=8, num_experts=4)
    return MoEConfig(**sizes, pattern="*E*", **changes)


def moe_layers(kind):
    """A lifted layer without a latent width, and LatentMoE."""
    configs = [moe_config(), moe_config(moe_latent_size=6)]
    return [y for config in configs for y in kind(config).double()(normal(2, 5, 16))]


def moe(which="ParallelMoELM"):
    import moe_fp8

    return getattr(moe_fp8, which)(moe_config()).double()


def moe_weights():
    return moe("MoELM").state_dict()


def hybrid():
    from fp8 import HYBRID

    return HYBRID


def quantized(x):
    from fp8 import quantize_fp8

    return quantize_fp8(x)


def routed(m, way):
    """`dispatch` or `combine`, of which the other is the chapter's."""
    import moe_fp8

    experts_TK = torch.tensor([[0, 2], [1, 0], [3, 2]])
    plan = moe_fp8.plan_dispatch(experts_TK, 4)
    rows = (m if way == "there" else moe_fp8).dispatch(normal(3, 4), plan)()
    return (m if way == "back" else moe_fp8).combine(rows, normal(3, 2), plan)


def moe_update(m):
    model = moe("MoELM")
    model(TOKENS)
    m.update_expert_bias(model.routers(), model.counts(), 0.01)
    return [router.bias for router in model.routers()]


def moe_reduce(m):
    import moe_fp8

    model = moe()
    model.loss(*BATCHES[0])[0].sum().backward()
    m.reduce_gradients(model, moe_fp8.Mesh())
    return [p.grad for p in model.parameters()]


def moe_run(m):
    import moe_fp8

    return losses(m.train(*with_optimizer(moe()), BATCHES, moe_fp8.Mesh()))


def converted(m):
    """A model of one's own with `layers`: the first and the last stay as they are."""
    torch.manual_seed(0)
    model = torch.nn.Module()
    linears = [torch.nn.Linear(16, 16, bias=False) for _ in range(3)]
    model.layers = torch.nn.ModuleList(torch.nn.Sequential(linear) for linear in linears)
    m.to_fp8(model, hybrid())
    assert [type(layer[0]).__name__ for layer in model.layers] == ["Linear", "FP8Linear", "Linear"]
    return [layer(torch.ones(4, 16)) for layer in model.layers]


def moe_gathered(m):
    with alone():
        return m.gather_state_dict(moe_weights())


def published_nemotron3(m, folder):
    from test_06_load_nemotron3 import publish

    publish(folder)
    return m.load_nemotron3(folder)[1]


def mixer():
    from moe_fp8 import Attention

    return Attention(moe_config())


# ── Chapter 8 ─────────────────────────────────────────────────────────────────────────────────────


def four_bit_config():
    from nvfp4 import GPTConfig

    return GPTConfig(vocab_size=13, num_layers=2, hidden_size=32, num_heads=2, seq_length=8)


def four_bit_gpt():
    """The plain model, which a lifted `to_nvfp4` may convert, too."""
    from nvfp4 import GPT

    return GPT(four_bit_config()).double()


def in_four_bits(**changes):
    import nvfp4

    return nvfp4.to_nvfp4(four_bit_gpt(), nvfp4.NVFP4Recipe(**changes))


def four_bits(*shape: int):
    from nvfp4 import nvfp4_quantize

    return nvfp4_quantize(torch.randn(shape))


def seeded_layer(m):
    """Its gradient, rounded with the random values of a place."""
    layer = getattr(m, "NVFP4Linear", None) or __import__("nvfp4").NVFP4Linear
    model = torch.nn.Sequential(layer(torch.nn.Linear(16, 32, bias=False)))
    m.seed_rounding(model, seed=1, step=2)
    return through(model, normal(16, 16).requires_grad_())


# ── Chapter 9 ─────────────────────────────────────────────────────────────────────────────────────

TWO_DOCUMENTS = torch.tensor([[0, 0, 0, 0, 4, 4]])


def small_mtp():
    from mtp import HybridConfig

    sizes = dict(ffn_hidden_size=8, mamba_heads=2, mamba_head_size=4, state_size=4)
    return HybridConfig(13, 16, attention_heads=2, attention_head_size=4, **sizes)


def small_hybrid():
    from mtp import HybridLM

    return HybridLM(small_mtp())


def SPAN():
    from mtp import Span

    return Span()


def MESH():
    from mtp import Mesh

    return Mesh()


def block_of(letter):
    from mtp import Block

    return Block(letter, small_mtp())


def filled(module):
    """Its parameters drawn: some are made empty."""
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.data = torch.rand(p.shape, generator=generator) / 4
    return module


def through_mtp(m):
    from mtp import Block

    layer = filled(m.MultiTokenPredictionLayer(small_mtp(), Block))
    return through(layer, normal(1, 5, 16), normal(1, 5, 16), SPAN())


def mtp_mesh(m):
    with alone() as device:
        mesh = m.make_mesh(1, 1, device)
    return [mesh.tp, mesh.cp, mesh.dp, mesh.tp_rank]


def mtp_steps(m):
    model = small_hybrid()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return list(m.train(model, optimizer, [(TWO_DOCUMENTS, TWO_DOCUMENTS + 1)] * 2))


GPT_1T = dict(layers=128, hidden=25600, heads=160)

BATCHES = [(TOKENS, TOKENS + 1)] * 2


# ── Chapter 10 ────────────────────────────────────────────────────────────────────────────────────


def hybrid_sizes():
    from compress import HybridConfig

    sizes = dict(vocab_size=16, hidden_size=8, pattern="M-*", ffn_hidden_size=6)
    heads = dict(num_attention_heads=4, attention_head_dim=2, mamba_num_heads=4, mamba_head_dim=3)
    return HybridConfig(**sizes, **heads, mamba_state_dim=2)


def pruned_hybrid(mesh=None):
    from compress import ALONE, HybridLM

    return HybridLM(hybrid_sizes(), mesh or ALONE).double()


def hybrid_scores():
    from compress import importance

    return importance(pruned_hybrid(), HYBRID_BATCHES)


def hybrid_input(letter: str):
    """Input, parameters and config of a layer, and a probe."""
    model = pruned_hybrid()
    layer = model.get_submodule(f"layers.{'M-*'.index(letter)}")
    return normal(2, 5, 8), layer.mixer, hybrid_sizes(), lambda axis, y: None


def hybrid_step(m):
    """A training step of the model, in the lifted copy or in the chapter."""
    model = pruned_hybrid()
    m_optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    return losses(m.train(model, m_optimizer, HYBRID_BATCHES * 2))


def with_gradients():
    from compress import cross_entropy

    model = pruned_hybrid()
    cross_entropy(model, *HYBRID_BATCHES[0]).sum().backward()
    return model


HYBRID_BATCHES = [(torch.arange(12).view(2, 6), torch.arange(12).view(2, 6) % 7)]


# ── Chapter 7 ─────────────────────────────────────────────────────────────────────────────────────


def zero_config():
    from zero_3d import GPTConfig

    return GPTConfig(13, num_layers=2, hidden_size=16, num_heads=2)


def zero_gpt(name="GPT"):
    """The plain model, or a stage that is all of it, in float64."""
    import zero_3d

    mesh = zero_3d.ParallelMesh()
    model = zero_3d.GPT(zero_config()) if name == "GPT" else zero_3d.Stage(zero_config(), mesh)
    return model.double()


def zero_parameters():
    return {"a": torch.nn.Parameter(normal(3)), "b": torch.nn.Parameter(normal(2, 2))}


def zero_optimizer(stage=None):
    """With gradients."""
    import zero_3d

    optimizer = zero_3d.make_training(stage or zero_gpt("Stage"), 1e-2, elements=100)
    for bucket in optimizer.buffer.buckets:
        bucket.grad.copy_(normal(len(bucket.grad)))
    return optimizer


def zero_grads(optimizer):
    return [bucket.grad for bucket in optimizer.buffer.buckets]


def zero_buffer(m):
    """What a backward leaves in a buffer, m's or one that m's buckets make."""
    import zero_3d

    params = zero_parameters()
    make = getattr(m, "ParamAndGradBuffer", None) or zero_3d.ParamAndGradBuffer
    buffer = make(params.items(), elements=1)
    (params["a"].sum() + params["b"].square().sum()).backward()
    buffer.finish_reduce_scatter()
    return [bucket.grad for bucket in buffer.buckets]


def zero_update(m):
    import zero_3d

    params = zero_parameters()
    buffer = zero_3d.ParamAndGradBuffer(params.items())
    optimizer = m.DistributedOptimizer(buffer, lambda groups: torch.optim.SGD(groups, 0.1))
    buffer.buckets[0].grad.fill_(1)
    optimizer.step()
    return list(params.values())


def zero_pieces(m):
    return [(piece.name, piece.start, piece.master) for piece in m.pieces_of(bucket_with_master())]


def bucket_with_master():
    import zero_3d

    bucket = zero_3d.Bucket(zero_parameters())
    bucket.master = bucket.data.clone()
    return bucket


def zero_finalized(m):
    import zero_3d

    optimizer = zero_optimizer()
    count = m.finalize_model_grads(optimizer, zero_3d.ParallelMesh(), torch.tensor(3))
    return count, zero_grads(optimizer)


def zero_clipped(m):
    import zero_3d

    optimizer = zero_optimizer()
    norm = m.clip_grad_norm_(optimizer, 0.5, zero_3d.ParallelMesh())
    return norm, zero_grads(optimizer)


def zero_step(m):
    stage = zero_gpt("Stage")
    optimizer = zero_optimizer(stage)
    optimizer.buffer.zero_grad()
    loss = m.run_1f1b(stage, optimizer.buffer, *BATCHES[0], 1)
    return loss, zero_grads(optimizer)


def zero_train(m):
    stage = zero_gpt("Stage")
    return losses(m.train(stage, zero_optimizer(stage), BATCHES, 1))


def collective_alone(start, shard_first):
    """A collective on a group of one."""
    with alone():
        shard = torch.zeros(4)
        full = torch.arange(4.0)
        start(*((shard, full) if shard_first else (full, shard)), dist.group.WORLD).wait()
        return shard, full


def one_zero_mesh(m):
    with alone() as device:
        mesh = m.make_mesh(1, 1, 1, device)
        return [mesh.tp, mesh.pp, mesh.dp, mesh.tp_rank, mesh.pp_rank, mesh.dp_rank]


def zero_weights(m, name):
    import zero_3d

    full = dict(zero_gpt().state_dict())
    return getattr(m, name)(
        full if name[0] == "s" else [full], zero_config(), zero_3d.ParallelMesh()
    )


def zero_mesh():
    from zero_3d import ParallelMesh

    return ParallelMesh()


EXAMPLES = {
    "deepspeech": {
        "group_size": lambda m, folder: m.group_size(),
        "group_rank": lambda m, folder: [m.group_rank()],
        "Counter": lambda m, folder: counted(m),
        "ring_all_reduce": lambda m, folder: m.ring_all_reduce(normal(5)),
        "GradientRing": lambda m, folder: ring_of(m),
        "sum_over_ranks": lambda m, folder: m.sum_over_ranks(normal(3)),
        "SequenceBatchNorm": lambda m, folder: through(
            m.SequenceBatchNorm(4), normal(5, 2, 4), torch.arange(5)[:, None] < torch.tensor([5, 3])
        ),
        "ctc_loss": lambda m, folder: m.ctc_loss(spoken(), utterances()[2], *utterances()[1::2]),
        "clipped_recurrence": lambda m, folder: m.clipped_recurrence(
            normal(5, 2, 3, 4), normal(2, 4, 4)
        ),
        "time_parallel_birnn": lambda m, folder: m.time_parallel_birnn(
            normal(5, 3, 4), normal(2, 4, 4)
        ),
        "plain_recurrence": lambda m, folder: m.plain_recurrence(
            normal(5, 2, 3, 4), normal(2, 4, 4)
        ),
        "RecurrentLayer": lambda m, folder: through(
            m.RecurrentLayer(5, 6, Normless, sum_so_far),
            normal(4, 2, 5),
            torch.ones(4, 2, dtype=torch.bool),
        ),
        "DeepSpeechConfig": lambda m, folder: m.DeepSpeechConfig().after(7, 0),
        "DeepSpeech2": lambda m, folder: m.DeepSpeech2(speech_config()).double()(*utterances()[:2]),
        "parallel_model": lambda m, folder: m.parallel_model(speech_config()).double()(
            *utterances()[:2]
        ),
        "check_replicas": lambda m, folder: m.check_replicas(net()),
        "padded_batch": lambda m, folder: vars(
            m.padded_batch([normal(5, 3), normal(2, 3)], [torch.tensor([1, 2]), torch.tensor([3])])
        ),
        "plain_gradients": lambda m, folder: m.plain_gradients(net(), speech_batches()[0]),
        "parallel_gradients": lambda m, folder: speech_gradients(m),
        "train_alone": lambda m, folder: speech_steps(m.train_alone),
        "train": lambda m, folder: speech_steps(m.train),
        "tones": lambda m, folder: vars(m.tones(3, speech_config(alphabet="_abc"), 0)),
        "greedy": lambda m, folder: m.greedy(spoken()[:, 0]),
    },
    "speech": {
        "SpeechConfig": lambda m, folder: list(m.SpeechConfig(hidden_size=16).settings().values()),
        "build": lambda m, folder: m.build(m.SpeechConfig(num_layers=1)).double().state_dict(),
        "gru": lambda m, folder: m.gru(normal(5, 2, 3, 12), normal(2, 4, 12)),
        "SpeechLayer": lambda m, folder: through(
            m.SpeechLayer(m.SpeechConfig(cell="gru"), 5, 6, Normless, None),
            normal(4, 2, 5),
            torch.ones(4, 2, dtype=torch.bool),
        ),
        "RowConvolution": lambda m, folder: through(
            m.RowConvolution(3, 2), normal(4, 2, 3), torch.ones(4, 2, dtype=torch.bool)
        ),
        "log_spectrogram": lambda m, folder: m.log_spectrogram(normal(4000), 8000, 8),
        "distort": lambda m, folder: m.distort(
            torch.randn(4000), m.SpeechConfig(), np.random.default_rng(0)
        ),
        "NGram": lambda m, folder: m.NGram(["one two", "two"]).score(("one",), "two"),
        "beam_search": lambda m, folder: m.beam_search(spoken()[:, 0], beam=4),
        "word_errors": lambda m, folder: m.word_errors(["one two"], ["one too"]),
        "read_manifest": lambda m, folder: [
            said.text for said in m.read_manifest(recorded(folder))
        ],
        "load_audio": lambda m, folder: m.load_audio(
            str(Path(recorded(folder)).parent / "a.wav"), 8000
        ),
        "synthesize": lambda m, folder: m.synthesize(
            ["one", "two"], 8000, np.random.default_rng(0)
        ).tolist(),
        "Speech": lambda m, folder: vars(
            m.Speech.synthetic(2, m.SpeechConfig(), 0).batch([1, 0], m.SpeechConfig())
        ),
        "save_model": saved_speech,
        "load_model": saved_speech,
        "optimizer_for": lambda m, folder: m.optimizer_for(net(), "adamw").defaults,
        "scheduled": lambda m, folder: list(
            m.scheduled(torch.optim.SGD(net().parameters(), 1.0), lambda step: 0.1, iter("abc"))
        ),
    },
    "megatron_tp": {
        "GPTConfig": lambda m, folder: vars(m.GPTConfig(hidden_size=16)),
        "copy_to_tp": lambda m, folder: m.copy_to_tp(normal(3, 4)),
        "reduce_from_tp": lambda m, folder: m.reduce_from_tp(normal(3, 4)),
        "scatter_to_tp": lambda m, folder: m.scatter_to_tp(normal(3, 4)),
        "gather_from_tp": lambda m, folder: m.gather_from_tp(normal(3, 4)),
        "ColumnParallelLinear": lambda m, folder: through(
            m.ColumnParallelLinear(4, 6), normal(2, 4)
        ),
        "RowParallelLinear": lambda m, folder: through(m.RowParallelLinear(4, 6), normal(2, 4)),
        "VocabParallelEmbedding": lambda m, folder: through(
            m.VocabParallelEmbedding(13, 4), TOKENS
        ),
        "vocab_parallel_cross_entropy": lambda m, folder: m.vocab_parallel_cross_entropy(
            normal(2, 6, 13), TOKENS
        ),
        "seed_dropout": lambda m, folder: masks(m),
        "core_attention": lambda m, folder: m.core_attention(
            *normal(3, 2, 2, 5, 4), m.Dropout(0.5)
        ),
        "Attention": lambda m, folder: through(m.Attention(small()), normal(2, 5, 16)),
        "MLP": lambda m, folder: through(m.MLP(small()), normal(2, 5, 16)),
        "Block": lambda m, folder: through(m.Block(small()), normal(2, 5, 16)),
        "GPT": lambda m, folder: through(m.GPT(small()), TOKENS),
        "parameter_shapes": lambda m, folder: list(m.parameter_shapes(small()).values()),
        "initial_weights": lambda m, folder: dict(m.initial_weights(small())),
        "ParallelGPT": lambda m, folder: through(m.ParallelGPT(small()), TOKENS),
        "shard_dim": lambda m, folder: m.shard_dim("layers.0.attention.out.weight"),
        "check_tp": lambda m, folder: m.check_tp(small(), 2) or "it fits",
        "shard_tensor": lambda m, folder: m.shard_tensor(
            "embedding.weight", normal(13, 16), small(), 1, 2
        ),
        "shard_state_dict": lambda m, folder: m.shard_state_dict(weights(), small(), 1, 2),
        "merge_state_dicts": lambda m, folder: m.merge_state_dicts([weights()], small()),
        "gather_state_dict": lambda m, folder: gathered(m),
        "Mesh": lambda m, folder: places(m.Mesh(tp=2, tp_rank=1)),
        "make_mesh": lambda m, folder: one_mesh(m),
        "sum_gradients": lambda m, folder: m.sum_gradients(gpt().parameters()) or "nothing to sum",
        "clip_grad_norm_": lambda m, folder: clipped(m),
        "train_alone": lambda m, folder: losses(m.train_alone(*with_optimizer(gpt()), BATCHES)),
        "train": lambda m, folder: losses(m.train(*with_optimizer(gpt()), BATCHES, zero_mesh())),
        "TextData": lambda m, folder: text_of(m, folder),
    },
    "load_nemotron_h": {
        "load_nemotron_h": published_hybrid,
        "published_name": lambda m, folder: m.published_name("final_norm.weight"),
        "read_config": lambda m, folder: vars(m.read_config(hybrid_folder(folder) / "config.json")),
        "read_pattern": lambda m, folder: m.read_pattern(folder, {"layer_types": ["mlp", "mamba"]}),
        "open_tensors": lambda m, folder: sorted(m.open_tensors(hybrid_folder(folder))),
        "read_json": lambda m, folder: m.read_json(hybrid_folder(folder) / "config.json"),
        "LayerState": lambda m, folder: vars(m.LayerState(8)),
        "Cache": lambda m, folder: admitted(m),
        "pad_prompts": lambda m, folder: m.pad_prompts([TOKENS[0], TOKENS[1, :2]]),
        "generate": lambda m, folder: m.generate(m.Decoder(hybrid_config()), TOKENS, 4),
    },
    "fast_scan": {
        "fast_ssd": lambda m, folder: m.fast_ssd(*scan_arguments(), 3),
        "FastMamba2Mixer": lambda m, folder: through(
            m.FastMamba2Mixer(hybrid_config()), normal(2, 5, 16)
        ),
    },
    "mamba_hybrid_tables": {
        "allocate_layers": lambda m, folder: m.allocate_layers(10, 0.2, 0.3),
        "parameters": lambda m, folder: m.parameters(hybrid_config()),
        "DecodeMemory": lambda m, folder: m.DecodeMemory(1, 2).total,
        "decode_memory": lambda m, folder: vars(m.decode_memory(hybrid_config(), 100)),
        "published": lambda m, folder: vars(m.published("M*-", 16, 8, 8, 8, 13)),
        "Row": lambda m, folder: m.Row("a claim", "1", "1").verdict,
        "print_table": lambda m, folder: m.print_table("title", []),
    },
    "pretrain": {
        "run_state": lambda m, folder: state_of_run(m),
        "save_checkpoint": checkpoint,
        "load_checkpoint": checkpoint,
        "read_run": run_of,
        "load_gpt2": published,
        "tokenizer": lambda m, folder: m.tokenizer("bytes").encode("text"),
        "folder_tokenizer": merges,
        "generate": lambda m, folder: m.generate(gpt().eval(), TOKENS[0], 4),
        "learning_rate": lambda m, folder: [m.learning_rate(step, 30) for step in range(40)],
    },
    "pipeline": {
        "Block": lambda m, folder: through(m.Block(pipeline_size()), normal(2, 5, 16)),
        "GPT": lambda m, folder: through(m.GPT(pipeline_size()), TOKENS),
        "GPTConfig": lambda m, folder: vars(m.GPTConfig(hidden_size=16, num_heads=2)),
        "token_losses": lambda m, folder: m.token_losses(normal(*TOKENS.shape, 13), TOKENS),
        "initialize": lambda m, folder: m.initialize(pipeline_gpt(), pipeline_size()) or "drawn",
        "parameter_shapes": lambda m, folder: list(m.parameter_shapes(pipeline_size()).values()),
        "schedule": lambda m, folder: m.schedule("interleaved", 2, 4, 2),
        "runs_ahead": lambda m, folder: m.runs_ahead("1f1b", 4, 8, 1, rank=0),
        "check_schedule": lambda m, folder: m.check_schedule("1f1b", 4, 8, 1) or "fits",
        "input_of": lambda m, folder: m.input_of(lists()[1][0], 2),
        "needs": lambda m, folder: m.needs(lists()[1][0], 2),
        "stages_of": lambda m, folder: m.stages_of(lists("interleaved", 2, 4, 2)),
        "Bar": lambda m, folder: m.Bar(lists()[0][0], 0, 1),
        "Timeline": lambda m, folder: m.Timeline(simulated().ranks).bubble,
        "simulate": lambda m, folder: m.simulate(lists()).bubble,
        "Hop": lambda m, folder: m.Hop(0, 1, lists()[0][0]),
        "Step": lambda m, folder: m.Step(lists()[0][0], []),
        "programs": lambda m, folder: m.programs(lists("interleaved", 2, 4, 2)),
        "microbatches_of": lambda m, folder: m.microbatches_of(
            __import__("pipeline").programs(lists())[0]
        ),
        "verify": lambda m, folder: m.verify(lists()),
        "place_layers": lambda m, folder: m.place_layers(7, 3),
        "PipelineStage": lambda m, folder: list(
            m.PipelineStage(pipeline_size(), 1, 2).parameters()
        ),
        "Mailbox": lambda m, folder: len(vars(m.Mailbox(one_device(), [], torch.float32, "cpu"))),
        "Executor": lambda m, folder: pipeline_executor(m),
        "edge_of": lambda m, folder: m.edge_of(normal(2)) or "no graph",
        "count_targets": lambda m, folder: m.count_targets(TOKENS),
        "check_step": lambda m, folder: (
            m.check_step(
                stage_of(),
                __import__("pipeline").programs(lists(p=1, m=2))[0],
                TOKENS,
                one_device(),
            )
            or "fits"
        ),
        "run_step": lambda m, folder: pipeline_step(m),
        "shard_state_dict": lambda m, folder: m.shard_state_dict(
            pipeline_gpt().state_dict(), pipeline_size(), 1, 2
        ),
        "merge_state_dicts": lambda m, folder: m.merge_state_dicts(
            [pipeline_gpt().state_dict()], pipeline_size()
        ),
        "gather_state_dict": lambda m, folder: m.gather_state_dict(
            pipeline_gpt().state_dict(), pipeline_size()
        ),
        "Mesh": lambda m, folder: vars(m.Mesh()),
        "make_mesh": lambda m, folder: one_mesh(m),
        "sum_gradients": lambda m, folder: m.sum_gradients(with_ones().parameters()) or "one rank",
        "clip_grad_norm_": lambda m, folder: m.clip_grad_norm_(with_ones(), 1.0),
        "train": lambda m, folder: pipeline_train(m),
    },
    "pipeline_tables": {
        "training_days": lambda m, folder: m.training_days(300e9, 1024, 140e12, 96, 12288)
    },
    "seq_parallel": {
        "gather_from_sp": lambda m, folder: m.gather_from_sp(normal(4, 2, 3)),
        "reduce_scatter_to_sp": lambda m, folder: m.reduce_scatter_to_sp(normal(4, 2, 3)),
        "scatter_to_sp": lambda m, folder: m.scatter_to_sp(normal(4, 2, 3)),
        "column_parallel": lambda m, folder: m.column_parallel(normal(3, 2, 4), normal(6, 4)),
        "SPColumnParallelLinear": lambda m, folder: through(
            m.SPColumnParallelLinear(4, 6), normal(3, 2, 4)
        ),
        "SPRowParallelLinear": lambda m, folder: through(
            m.SPRowParallelLinear(4, 6), normal(3, 2, 4)
        ),
        "mark": lambda m, folder: marked(m),
        "reduce_sequence_parallel_grads": lambda m, folder: (
            m.reduce_sequence_parallel_grads(sp_gpt()) or "one rank"
        ),
        "unfused_attention": lambda m, folder: m.unfused_attention(
            *normal(3, 4, 5, 2), no_dropout()
        ),
        "fused_attention": lambda m, folder: m.fused_attention(*normal(3, 4, 5, 2), no_dropout()),
        "recompute": lambda m, folder: m.recompute(torch.sin, normal(3).requires_grad_()),
        "recomputed_core": lambda m, folder: sp_recomputed(m),
        "Attention": lambda m, folder: sp_attention(m),
        "MLP": lambda m, folder: through(
            m.MLP(sp_config(), torch.nn.Linear, torch.nn.Linear), normal(5, 2, 16)
        ),
        "Layer": lambda m, folder: through(m.Layer(sp_config()), normal(5, 2, 16)),
        "GPT": lambda m, folder: through(m.GPT(sp_config()), TOKENS),
        "SequenceParallelLayer": lambda m, folder: through(
            m.SequenceParallelLayer(sp_config(), recompute="selective"),
            normal(5, 2, 16).requires_grad_(),
        ),
        "vocab_parallel_embedding": lambda m, folder: m.vocab_parallel_embedding(
            TOKENS.T, normal(13, 4), 13
        ),
        "SequenceParallelGPT": lambda m, folder: through(
            m.SequenceParallelGPT(sp_config()), TOKENS
        ),
        "shard_state_dict": lambda m, folder: m.shard_state_dict(
            sp_gpt().state_dict(), sp_config()
        ),
        "train": lambda m, folder: losses(m.train(*with_optimizer(sp_gpt()), BATCHES)),
        "saved_tensors": lambda m, folder: m.saved_tensors(normal(3).requires_grad_().exp),
        "saved_bytes": lambda m, folder: [m.saved_bytes(normal(3).requires_grad_().exp)],
        "activation_bytes": lambda m, folder: [m.activation_bytes(sp_config(), 2, "selective")],
        "layer_cost": lambda m, folder: cost_of_layer(m),
        "multiple_above": lambda m, folder: [m.multiple_above(5, 3)],
    },
    "mamba_hybrid": {
        "HybridConfig": lambda m, folder: list(vars(m.HybridConfig()).values()),
        "segsum": lambda m, folder: m.segsum(normal(3, 5)),
        "log_decay": lambda m, folder: m.log_decay(
            -normal(2, 7, 4).abs(), normal(4).abs(), normal(2, 7) > 1
        ),
        "ssd_recurrent": lambda m, folder: m.ssd_recurrent(*scan_arguments()),
        "ssd_quadratic": lambda m, folder: m.ssd_quadratic(*scan_arguments()),
        "ssd": lambda m, folder: m.ssd(*scan_arguments(), 3),
        "causal_conv1d": lambda m, folder: m.causal_conv1d(
            normal(2, 10, 3), normal(3, 4), normal(3)
        ),
        "Span": lambda m, folder: vars(m.Span(TOKENS)),
        "last_documents": lambda m, folder: m.last_documents(TOKENS, 3, 4),
        "causal_mask": lambda m, folder: m.causal_mask(
            2, TOKENS.shape[1], TOKENS, torch.device("cpu")
        ),
        "RMSNorm": lambda m, folder: through(m.RMSNorm(8, groups=2), normal(2, 5, 8)),
        "Mamba2Mixer": lambda m, folder: through(m.Mamba2Mixer(hybrid_config()), normal(2, 5, 16)),
        "Attention": lambda m, folder: through(m.Attention(hybrid_config()), normal(2, 5, 16)),
        "SquaredReLUMLP": lambda m, folder: through(
            m.SquaredReLUMLP(hybrid_config()), normal(2, 5, 16)
        ),
        "HybridLM": lambda m, folder: through(m.HybridLM(hybrid_config()), TOKENS),
        "initial_value": lambda m, folder: m.initial_value(
            "A_log", torch.Size([4]), hybrid_config()
        ),
        "parameter_shapes": lambda m, folder: list(m.parameter_shapes(hybrid_config()).values()),
        "initial_weights": lambda m, folder: dict(m.initial_weights(hybrid_config())),
        "components": lambda m, folder: m.components(
            "layers.1.mixer.q_proj.weight", hybrid_config()
        ),
        "local_config": lambda m, folder: vars(m.local_config(hybrid_config(), 2)),
        "ssd_context_parallel": lambda m, folder: m.ssd_context_parallel(*scan_arguments(), 3),
        "from_earlier_ranks": lambda m, folder: m.from_earlier_ranks(normal(2, 5, 3)),
        "ParallelHybridLM": lambda m, folder: through(m.ParallelHybridLM(hybrid_config()), TOKENS),
        "shard_tensor": lambda m, folder: m.shard_tensor(
            "layers.0.mixer.dt_bias", normal(4), hybrid_config(), 1, 2
        ),
        "shard_state_dict": lambda m, folder: m.shard_state_dict(
            hybrid_weights(), hybrid_config(), 1, 2
        ),
        "merge_state_dicts": lambda m, folder: m.merge_state_dicts(
            [hybrid_weights()], hybrid_config()
        ),
        "merge_tensor": lambda m, folder: m.merge_tensor(
            "layers.0.mixer.dt_bias", [normal(2), normal(2)], hybrid_config()
        ),
        "check_shapes": lambda m, folder: (
            m.check_shapes(hybrid_weights(), hybrid_config()) or "they fit"
        ),
        "gather_state_dict": lambda m, folder: m.gather_state_dict(
            hybrid_weights(), hybrid_config()
        ),
        "make_optimizer": lambda m, folder: [
            group["weight_decay"] for group in m.make_optimizer(hybrid_model(), 1e-3).param_groups
        ],
        "train": lambda m, folder: losses(m.train(*with_optimizer(hybrid_model()), BATCHES)),
        "multiple_above": lambda m, folder: [m.multiple_above(5, 3)],
    },
    "context_parallel": {
        "Mesh": lambda m, folder: vars(m.Mesh(1, 1, 0, 0, None, None)),
        "make_mesh": lambda m, folder: one_hybrid_mesh(m),
        "ShardedSpan": lambda m, folder: vars(m.ShardedSpan(TOKENS)),
        "shard_lengths": lambda m, folder: m.shard_lengths(11, 3, 4),
        "halo": lambda m, folder: m.halo(normal(2, 5, 3), 3),
        "keys_of_all_ranks": lambda m, folder: m.keys_of_all_ranks(normal(1, 2, 5, 6), [5]),
        "ShardedMixer": lambda m, folder: through(
            m.ShardedMixer(hybrid_config()), normal(2, 5, 16), sharded_span()
        ),
        "ShardedAttention": lambda m, folder: through(
            m.ShardedAttention(hybrid_config()), normal(2, 5, 16), sharded_span()
        ),
        "with_copies": lambda m, folder: vars(m.with_copies(hybrid_config(), 4)),
        "component_copies": lambda m, folder: m.component_copies(
            "layers.0.mixer.conv_weight", hybrid_config(), 4
        ),
        "copy_groups": lambda m, folder: group_copies(m)[:1],
        "drop_copies": lambda m, folder: m.drop_copies(
            "head.weight", normal(3), hybrid_config(), 2
        ),
        "shard_with_copies": lambda m, folder: m.shard_with_copies(
            "layers.0.mixer.dt_bias", normal(4), hybrid_config(), 1, 4
        ),
        "shard_for_mesh": lambda m, folder: m.shard_for_mesh(
            hybrid_weights(), hybrid_config(), 1, 4
        ),
        "merge_from_mesh": lambda m, folder: m.merge_from_mesh([hybrid_weights()], hybrid_config()),
        "SharedNorm": lambda m, folder: through(m.SharedNorm(8, 1e-5, None), normal(2, 5, 8)),
        "MeshHybridLM": lambda m, folder: through(
            m.MeshHybridLM(hybrid_config(), hybrid_mesh()), TOKENS
        ),
        "gradient_parts": lambda m, folder: [x for _, x, _ in m.gradient_parts(mesh_gradients())],
        "sum_over": lambda m, folder: summed(m),
        "reduce_gradients": lambda m, folder: hybrid_reduced(m),
        "grad_norm": lambda m, folder: m.grad_norm(mesh_gradients()),
        "layer_messages": lambda m, folder: m.layer_messages(hybrid_mesh(), 8, torch.device("cpu")),
        "Sent": lambda m, folder: type(m.Sent()).__name__,
    },
    "moe_fp8": {
        "MoEConfig": lambda m, folder: list(vars(m.MoEConfig()).values()),
        "Layer": lambda m, folder: list(
            m.Layer(moe_config(), mixer()).double()(normal(2, 5, 16), normal(2))
        ),
        "MLP": lambda m, folder: through(m.MLP(moe_config()), normal(2, 5, 16)),
        "overload": lambda m, folder: m.overload(moe("MoELM")).state_dict(),
        "Router": lambda m, folder: list(m.Router(moe_config()).double()(normal(5, 16))),
        "update_expert_bias": lambda m, folder: moe_update(m),
        "grouped_gemm": lambda m, folder: m.grouped_gemm(normal(5, 3), normal(2, 4, 3), [2, 3]),
        "Experts": lambda m, folder: through(
            m.Experts(moe_config()), normal(5, 16), [2, 3] + [0] * (moe_config().num_experts - 2)
        ),
        "MoELayer": lambda m, folder: moe_layers(m.MoELayer),
        "Attention": lambda m, folder: list(m.Attention(moe_config()).double()(normal(2, 5, 16))),
        "MoELM": lambda m, folder: list(m.MoELM(moe_config()).double()(TOKENS)),
        "state_shapes": lambda m, folder: list(m.state_shapes(moe_config()).values()),
        "initial_weights": lambda m, folder: dict(m.initial_weights(moe_config())),
        "train_alone": lambda m, folder: losses(
            m.train_alone(*with_optimizer(moe("MoELM")), BATCHES)
        ),
        "all_to_all": lambda m, folder: m.all_to_all(normal(3, 2), [3], [3]),
        "start_all_to_all": lambda m, folder: m.start_all_to_all(normal(3, 2), [3], [3])(),
        "plan_dispatch": lambda m, folder: (
            m.plan_dispatch(torch.tensor([[0, 2], [1, 0]]), 4).counts
        ),
        "dispatch": lambda m, folder: routed(m, "there"),
        "combine": lambda m, folder: routed(m, "back"),
        "ExpertParallelMoELayer": lambda m, folder: moe_layers(m.ExpertParallelMoELayer),
        "ParallelMoELM": lambda m, folder: list(m.ParallelMoELM(moe_config()).double()(TOKENS)),
        "shard_tensor": lambda m, folder: m.shard_tensor(
            "layers.1.mixer.experts.up", normal(4, 8, 16), 1, 2
        ),
        "check_state": lambda m, folder: m.check_state(moe_weights(), moe_config()) or "it fits",
        "shard_state_dict": lambda m, folder: m.shard_state_dict(moe_weights(), moe_config(), 1, 2),
        "merge_state_dicts": lambda m, folder: m.merge_state_dicts([moe_weights()]),
        "gather_state_dict": lambda m, folder: moe_gathered(m),
        "Mesh": lambda m, folder: list(vars(m.Mesh()).values())[:3],
        "Plan": lambda m, folder: vars(m.Plan(TOKENS, TOKENS, [1], [1], [1], 2, None))["order_R"],
        "make_mesh": lambda m, folder: one_mesh(m),
        "sum_gradients": lambda m, folder: m.sum_gradients(moe().parameters()) or "nothing to sum",
        "reduce_gradients": lambda m, folder: moe_reduce(m),
        "rank_rows": lambda m, folder: m.rank_rows(TOKENS),
        "train": lambda m, folder: moe_run(m),
    },
    "fp8": {
        "fp8_hardware": lambda m, folder: m.fp8_hardware("auto", torch.device("cpu"), hybrid()),
        "quantize_fp8": lambda m, folder: m.quantize_fp8(torch.randn(4, 4))[0].view(torch.uint8),
        "dequantize_fp8": lambda m, folder: m.dequantize_fp8(quantized(torch.randn(4, 4))),
        "fp8_gemm": lambda m, folder: m.fp8_gemm(
            quantized(torch.randn(4, 8)), quantized(torch.randn(3, 8)), torch.float32
        ),
        "fp8_linear": lambda m, folder: m.fp8_linear(
            torch.randn(4, 16), torch.randn(16, 16), hybrid()
        ),
        "FP8Recipe": lambda m, folder: list(m.FP8Recipe().covered(4)),
        "FP8Linear": lambda m, folder: m.FP8Linear(torch.nn.Linear(16, 16, bias=False))(
            torch.randn(4, 16)
        ),
        "fp8_grouped_gemm": lambda m, folder: m.fp8_grouped_gemm(
            torch.randn(5, 16), torch.randn(2, 16, 16), [2, 3], hybrid()
        ),
        "to_fp8": lambda m, folder: converted(m),
    },
    "zero_3d": {
        "GPTConfig": lambda m, t: vars(m.GPTConfig(hidden_size=8)),
        "ParallelMesh": lambda m, t: [m.ParallelMesh(2, 3, 4).dp, m.ParallelMesh().sp],
        "rank_of": lambda m, t: m.rank_of(type("Mesh", (), {"tp": 4, "dp": 8}), 1, 2, 3),
        "make_mesh": lambda m, t: one_zero_mesh(m),
        "start_reduce_scatter": lambda m, t: collective_alone(m.start_reduce_scatter, True),
        "start_all_gather": lambda m, t: collective_alone(m.start_all_gather, False),
        "Bucket": lambda m, t: m.Bucket(zero_parameters()).data,
        "split_into_buckets": lambda m, t: [
            sorted(part) for part in m.split_into_buckets(zero_parameters(), 1)
        ],
        "ParamAndGradBuffer": lambda m, t: zero_buffer(m),
        "DistributedOptimizer": lambda m, t: zero_update(m),
        "pieces_of": lambda m, t: zero_pieces(m),
        "finalize_model_grads": lambda m, t: zero_finalized(m),
        "clip_grad_norm_": lambda m, t: zero_clipped(m),
        "alibi_bias": lambda m, t: m.alibi_bias(zero_config(), zero_mesh(), 5, normal(1)),
        "Block": lambda m, t: through(
            m.Block(zero_config(), zero_mesh()), normal(5, 3, 16), torch.zeros(2, 5, 5).double()
        ),
        "GPT": lambda m, t: m.GPT(zero_config()).double()(BATCHES[0][0]),
        "initial_weight": lambda m, t: m.initial_weight(
            "a.weight", torch.Size([2, 3]), zero_config()
        ),
        "parameter_shapes": lambda m, t: list(m.parameter_shapes(zero_config()).items()),
        "enter_tp": lambda m, t: m.enter_tp(normal(2, 3), zero_mesh()),
        "leave_tp": lambda m, t: m.leave_tp(normal(2, 3), zero_mesh()),
        "local_rows": lambda m, t: m.local_rows(torch.arange(6), 3, zero_mesh()),
        "vocab_parallel_loss": lambda m, t: m.vocab_parallel_loss(
            normal(5, 2, 13), torch.zeros(5, 2, dtype=torch.int64), 11, zero_mesh()
        ),
        "stages_of": lambda m, t: m.stages_of("layers.1.up.weight", zero_config(), 2),
        "Stage": lambda m, t: m.Stage(zero_config(), zero_mesh()).double()(*BATCHES[0]),
        "shard_dim": lambda m, t: [m.shard_dim("layers.0.out.weight"), m.shard_dim("a.bias")],
        "check_heads": lambda m, t: [m.check_heads(zero_config(), 2)],
        "shard_tensor": lambda m, t: m.shard_tensor(
            "embedding.weight", normal(13, 4), zero_config(), zero_mesh()
        ),
        "shard_state_dict": lambda m, t: zero_weights(m, "shard_state_dict"),
        "merge_state_dicts": lambda m, t: zero_weights(m, "merge_state_dicts"),
        "exchange": lambda m, t: [m.exchange(zero_mesh(), normal(2, 2), 1, None, True)],
        "run_1f1b": lambda m, t: zero_step(m),
        "check_batch": lambda m, t: [m.check_batch((4, 8), 2, zero_mesh())],
        "make_training": lambda m, t: [
            piece.master for piece in m.make_training(zero_gpt("Stage"), 1e-2).pieces
        ],
        "train": lambda m, t: zero_train(m),
        "state_bytes": lambda m, t: m.state_bytes(zero_optimizer()),
        "ones": lambda m, t: m.ones(zero_gpt()),
    },
}

EXAMPLES["nvfp4"] = {
    "GPTConfig": lambda m, folder: vars(m.GPTConfig(hidden_size=16)),
    "nvfp4_quantize": lambda m, folder: list(m.nvfp4_quantize(torch.randn(4, 32))[::2]),
    "nvfp4_dequantize": lambda m, folder: m.nvfp4_dequantize(four_bits(4, 32)),
    "random_hadamard": lambda m, folder: m.random_hadamard(normal(3, 32)),
    "nvfp4_gemm": lambda m, folder: m.nvfp4_gemm(four_bits(4, 32), four_bits(3, 32), torch.float64),
    "NVFP4Linear": lambda m, folder: through(
        m.NVFP4Linear(torch.nn.Linear(16, 32, bias=False)), normal(2, 16, 16)
    ),
    "seed_rounding": lambda m, folder: seeded_layer(m),
    "Block": lambda m, folder: through(m.Block(four_bit_config()), normal(2, 5, 32)),
    "GPT": lambda m, folder: through(m.GPT(four_bit_config()), TOKENS),
    "to_nvfp4": lambda m, folder: m.to_nvfp4(four_bit_gpt(), m.NVFP4Recipe()).state_dict(),
    "check_tp": lambda m, folder: m.check_tp(four_bit_config(), 2) or "it fits",
    "sharded_parameters": lambda m, folder: len(m.sharded_parameters(in_four_bits())),
    "shard_dim": lambda m, folder: [m.shard_dim("layers.0.out.weight", range(1))],
    "shard_state_dict": lambda m, folder: m.shard_state_dict(
        four_bit_gpt().state_dict(), range(1), 1, 2
    ),
    "merge_state_dicts": lambda m, folder: m.merge_state_dicts(
        [four_bit_gpt().state_dict()], range(1)
    ),
    "gather_state_dict": lambda m, folder: m.gather_state_dict(
        four_bit_gpt().state_dict(), range(1)
    ),
    "seeded": lambda m, folder: list(m.seeded(in_four_bits(), FOUR_BIT_BATCHES)),
    "sum_gradients": lambda m, folder: (
        m.sum_gradients(four_bit_gpt().parameters()) or "nothing to sum"
    ),
    "train": lambda m, folder: losses(
        m.train(*with_optimizer(in_four_bits(stochastic=False)), FOUR_BIT_BATCHES)
    ),
}
FOUR_BIT_BATCHES = [(torch.arange(32).view(4, 8) % 13, torch.arange(32).view(4, 8) % 7)] * 2

EXAMPLES["mtp"] = {
    "HybridConfig": lambda m, folder: vars(m.HybridConfig(hidden_size=16)),
    "last_of_documents": lambda m, folder: m.last_of_documents(TWO_DOCUMENTS),
    "roll_tensor": lambda m, folder: m.roll_tensor(TWO_DOCUMENTS, TWO_DOCUMENTS > 3, -100),
    "from_next_rank": lambda m, folder: m.from_next_rank(TWO_DOCUMENTS[:, :1], 5),
    "process_mtp_loss": lambda m, folder: m.process_mtp_loss(
        [normal(1, 6), normal(1, 6)], [TWO_DOCUMENTS, TWO_DOCUMENTS], 0.3
    ),
    "MultiTokenPredictionLayer": lambda m, folder: through_mtp(m),
    "RMSNorm": lambda m, folder: through(m.RMSNorm(8), normal(2, 3, 8)),
    "Mamba2Mixer": lambda m, folder: through(
        filled(m.Mamba2Mixer(small_mtp())), normal(1, 5, 16), SPAN()
    ),
    "Attention": lambda m, folder: through(
        filled(m.Attention(small_mtp())), normal(1, 5, 16), SPAN()
    ),
    "SquaredReLUMLP": lambda m, folder: through(
        filled(m.SquaredReLUMLP(small_mtp())), normal(1, 5, 16), SPAN()
    ),
    "Block": lambda m, folder: through(filled(m.Block("M", small_mtp())), normal(1, 5, 16), SPAN()),
    "run_layers": lambda m, folder: m.run_layers(
        [filled(block_of("-")), filled(block_of("*"))], normal(1, 5, 16).float(), SPAN()
    ),
    "Span": lambda m, folder: m.Span(TWO_DOCUMENTS).layer(3).document_BT,
    "Mesh": lambda m, folder: [m.Mesh(2, 3).cp, m.Mesh().tp],
    "HybridLM": lambda m, folder: list(m.HybridLM(small_mtp()).loss(TWO_DOCUMENTS, TWO_DOCUMENTS)),
    "initial_value": lambda m, folder: m.initial_value(
        "x.weight", normal(2, 3), small_mtp(), torch.Generator().manual_seed(0)
    ),
    "initialize": lambda m, folder: m.initialize(small_hybrid()) or "done",
    "make_mesh": lambda m, folder: mtp_mesh(m),
    "ParallelBlock": lambda m, folder: through(
        filled(m.ParallelBlock("*", small_mtp(), MESH())), normal(1, 5, 16), SPAN()
    ),
    "ParallelHybridLM": lambda m, folder: list(
        m.ParallelHybridLM(small_mtp()).loss(TWO_DOCUMENTS, TWO_DOCUMENTS)
    ),
    "shard_vocabulary": lambda m, folder: m.shard_vocabulary(normal(13, 2), 1, 2),
    "shard_state_dict": lambda m, folder: m.shard_state_dict(small_hybrid().state_dict(), 1, 2),
    "merge_state_dicts": lambda m, folder: m.merge_state_dicts([small_hybrid().state_dict()], 13),
    "gather_state_dict": lambda m, folder: m.gather_state_dict(small_hybrid().state_dict(), 13),
    "local_part": lambda m, folder: m.local_part((TWO_DOCUMENTS,), MESH()),
    "sum_gradients": lambda m, folder: m.sum_gradients([], None) or "nothing to sum",
    "train": lambda m, folder: mtp_steps(m),
}

EXAMPLES["compress"] = {
    "HybridConfig": lambda m, folder: vars(m.HybridConfig(pattern="M*")),
    "parameter_axes": lambda m, folder: list(m.parameter_axes(hybrid_sizes())),
    "axis_size": lambda m, folder: m.axis_size(
        ("mamba_num_heads", "mamba_head_dim"), hybrid_sizes()
    ),
    "Mesh": lambda m, folder: vars(m.Mesh(tp=2)) | {"groups": 0},
    "parameter_shapes": lambda m, folder: list(m.parameter_shapes(hybrid_sizes()).values()),
    "rows_of": lambda m, folder: m.rows_of(
        "layers.1.mixer.up_proj.weight", hybrid_sizes(), {"ffn_hidden_size": torch.tensor([4, 1])}
    ),
    "slice_tensor": lambda m, folder: m.slice_tensor(
        "head.weight", normal(16, 8), hybrid_sizes(), {"hidden_size": torch.tensor([0, 3])}
    ),
    "slice_state_dict": lambda m, folder: m.slice_state_dict(
        pruned_hybrid().state_dict(), hybrid_sizes(), {"mamba_num_heads": torch.tensor([1, 2])}
    ),
    "importance": lambda m, folder: m.importance(pruned_hybrid(), HYBRID_BATCHES),
    "best_in_groups": lambda m, folder: m.best_in_groups(torch.arange(8.0), 2, 4),
    "choose": lambda m, folder: m.choose(hybrid_scores(), hybrid_sizes(), {"hidden_size": 5})[1],
    "rms_norm": lambda m, folder: m.rms_norm(normal(2, 3, 8), normal(8), 1e-5, 2),
    "ssd": lambda m, folder: m.ssd(
        normal(2, 5, 4, 3), -normal(2, 5, 4).abs(), normal(2, 5, 2, 6), normal(2, 5, 2, 6)
    ),
    "mamba": lambda m, folder: m.mamba(*hybrid_input("M")).detach(),
    "attention": lambda m, folder: m.attention(*hybrid_input("*")).detach(),
    "feed_forward": lambda m, folder: m.feed_forward(*hybrid_input("-")).detach(),
    "HybridLM": lambda m, folder: through(m.HybridLM(hybrid_sizes()), HYBRID_BATCHES[0][0]),
    "initial_weights": lambda m, folder: m.initial_weights(hybrid_sizes()),
    "shard_units": lambda m, folder: m.shard_units(hybrid_sizes(), 1, 2),
    "local_config": lambda m, folder: vars(m.local_config(hybrid_sizes(), 2)),
    "shard_state_dict": lambda m, folder: m.shard_state_dict(
        pruned_hybrid().state_dict(), hybrid_sizes(), 1, 2
    ),
    "merge_tensor": lambda m, folder: m.merge_tensor(
        "head.weight", [normal(8, 8), normal(8, 8)], hybrid_sizes()
    ),
    "merge_state_dicts": lambda m, folder: m.merge_state_dicts(
        [pruned_hybrid().state_dict()], hybrid_sizes()
    ),
    "gather_tensor": lambda m, folder: m.gather_tensor(
        "head.weight", normal(16, 8), hybrid_sizes(), pruned_hybrid().mesh
    ),
    "prune": lambda m, folder: m.prune(
        pruned_hybrid(), {"hidden_size": 5}, hybrid_scores()
    ).state_dict(),
    "make_mesh": lambda m, folder: mesh_alone(m),
    "is_sharded": lambda m, folder: list(m.is_sharded(pruned_hybrid()).values()),
    "sum_gradients": lambda m, folder: m.sum_gradients(with_gradients()) or "nothing to sum",
    "grad_norm": lambda m, folder: m.grad_norm(
        with_gradients(), dict.fromkeys(pruned_hybrid().state_dict(), False)
    ),
    "cross_entropy": lambda m, folder: m.cross_entropy(
        pruned_hybrid(), *HYBRID_BATCHES[0]
    ).detach(),
    "of_replica": lambda m, folder: m.of_replica(HYBRID_BATCHES[0], pruned_hybrid().mesh),
    "partial_mean": lambda m, folder: m.partial_mean(
        pruned_hybrid(), HYBRID_BATCHES[0], lambda model, tokens, targets: targets * 1.5
    ),
    "train": lambda m, folder: hybrid_step(m),
}


def mesh_alone(m):
    with alone() as device:
        mesh = m.make_mesh(1, device)
        return [mesh.tp, mesh.dp, mesh.tp_rank, mesh.dp_rank]


DEMONSTRATED_10 = ("check_case", "scores_of", "gathered", "evaluate", "text_batches")
DEMONSTRATED_10 += ("gradients", "smaller_sizes", "measure")

# ── Chapter 13 ────────────────────────────────────────────────────────────────────────────────────


def small_nemotron(pattern="ME", **changes):
    from nemotron3 import NemotronConfig

    sizes = dict(mamba_heads=2, mamba_head_size=4, state_size=4, attention_heads=2)
    sizes |= dict(attention_head_size=4, num_experts=4, top_k=2, expert_size=6, shared_size=6)
    sizes |= dict(moe_latent_size=8, mtp_pattern="*E", init_std=0.3)
    return NemotronConfig(13, 16, pattern, **(sizes | changes))


def nemotron():
    from nemotron3 import NemotronLM

    return NemotronLM(small_nemotron()).double()


def nemotron_span(B=1, T=6):
    from nemotron3 import Span

    return Span(None, (B, T))


def nemotron_mesh(**sizes):
    from nemotron3 import Mesh

    return Mesh(**sizes)


def nemotron_step(m):
    model = nemotron()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return list(next(m.train(model, optimizer, [(TWO_DOCUMENTS, TWO_DOCUMENTS)])))


def nemotron_with_gradients():
    model = nemotron()
    model.loss(TWO_DOCUMENTS, TWO_DOCUMENTS)[0].backward()
    return model


def of_layers(module, x, span):
    """What a layer returns, and the balancing loss that it has left in the span."""
    return [module.double()(x, span), *span.balance]


def nemotron_groups(m):
    with alone() as device:
        mesh = m.make_mesh(1, 1, device)
    return [mesh.tp, mesh.ep, mesh.dp, mesh.ep_rank]


# ── Chapter 11 ────────────────────────────────────────────────────────────────────────────────────


def preference_config():
    from preference import GPTConfig

    return GPTConfig(vocab_size=13, num_layers=1, hidden_size=32, num_heads=4)


def preference_gpt():
    from preference import ParallelGPT

    return ParallelGPT(preference_config()).double()


def two_pairs():
    """Chosen, rejected, difference of rewards."""
    prompt = [1, 2, 3]
    return [((prompt, [4, 5]), (prompt, [6]), 0.5), ((prompt, [7]), (prompt, [8, 9]), 1.0)]


def pair_tensors():
    from preference import pair_batch

    return pair_batch(two_pairs(), preference_gpt(), torch.device("cpu"))


def flat_config(config):
    return [getattr(config, name) for name in ("head_size", "rotary_size", "ffn_hidden_size")]


EXAMPLES["preference"] = {
    "GPTConfig": lambda m, folder: flat_config(m.GPTConfig(hidden_size=16, num_heads=4)),
    "vocab_parallel_log_probs": lambda m, folder: m.vocab_parallel_log_probs(
        normal(2, 5, 13), TOKENS[:2, :5] % 13
    ),
    "Sequences": lambda m, folder: list(m.Sequences(*[TOKENS] * 5).to(torch.device("cpu"))),
    "collate": lambda m, folder: list(m.collate([([1, 2], [3]), ([4], [5, 6])], 6)),
    "sequence_log_probs": lambda m, folder: m.sequence_log_probs(
        preference_gpt(), pair_tensors().sequences
    ),
    "rpo_loss": lambda m, folder: m.rpo_loss(normal(4), normal(4)),
    "apply_rotary": lambda m, folder: m.apply_rotary(normal(1, 2, 3, 8), normal(2, 1, 3, 4)),
    "Block": lambda m, folder: through(
        m.Block(preference_config()), normal(1, 5, 32), normal(2, 1, 5, 4), None
    ),
    "GPT": lambda m, folder: through(m.GPT(preference_config()), TOKENS % 13),
    "initial_weights": lambda m, folder: dict(m.initial_weights(preference_config())),
    "ParallelBlock": lambda m, folder: through(
        m.ParallelBlock(preference_config()), normal(1, 5, 32), normal(2, 1, 5, 4), None
    ),
    "ParallelGPT": lambda m, folder: through(m.ParallelGPT(preference_config()), TOKENS % 13),
    "shard_dim": lambda m, folder: [m.shard_dim("layers.0.out.weight")],
    "sharded_parameters": lambda m, folder: len(m.sharded_parameters(preference_gpt())),
    "check_tp": lambda m, folder: m.check_tp(preference_config(), 4) or "it fits",
    "shard_tensor": lambda m, folder: m.shard_tensor(
        "output.weight", normal(13, 4), preference_config(), 1, 2
    ),
    "shard_state_dict": lambda m, folder: m.shard_state_dict(
        preference_gpt().state_dict(), preference_config(), 1, 2
    ),
    "merge_state_dicts": lambda m, folder: m.merge_state_dicts(
        [preference_gpt().state_dict()], preference_config()
    ),
    "gather_state_dict": lambda m, folder: m.gather_state_dict(
        preference_gpt().state_dict(), preference_config()
    ),
    "make_mesh": lambda m, folder: one_rank_mesh(m),
    "Mesh": lambda m, folder: [m.Mesh(2).tp],
    "Pairs": lambda m, folder: list(m.Pairs(TOKENS, TOKENS, TOKENS)),
    "rotary_cos_sin": lambda m, folder: m.rotary_cos_sin(
        TOKENS, preference_config(), torch.float64
    ),
    "sft_objective": lambda m, folder: list(
        m.sft_objective(preference_gpt(), pair_tensors().sequences)
    ),
    "PreferenceObjective": lambda m, folder: list(
        m.PreferenceObjective("rpo", sft_weight=0.1)(preference_gpt(), pair_tensors())
    ),
    "average_gradients": lambda m, folder: m.average_gradients(
        preference_gpt().parameters(), torch.tensor(3.0), torch.tensor(2.0)
    ),
    "train": lambda m, folder: losses(
        m.train(*with_optimizer(preference_gpt()), [[pair_tensors()]] * 2, preference_objective())
    ),
    "pair_batch": lambda m, folder: list(
        m.pair_batch(two_pairs(), preference_gpt(), torch.device("cpu"))[1:]
    ),
}


def preference_objective():
    from preference import PreferenceObjective

    return PreferenceObjective("dpo", sft_weight=0.1)


# ── Chapter 12 ────────────────────────────────────────────────────────────────────────────────────


def grpo_policy():
    from grpo import GPT, GPTConfig

    return GPT(GPTConfig(hidden_size=32)).double()


def grpo_responses():
    from grpo import Response

    return [
        Response([1, 2], [3, 11], [-2.5, -3.0], [False, False], True),
        Response([4], [5, 6, 7], [-2.0, -2.5, -3.0], [False, True, False], False),
    ]


def grpo_batch():
    from grpo import rollout_batch

    advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
    return rollout_batch(grpo_responses(), advantages, torch.device("cpu"))


def grpo_masks(m):
    """Arguments of importance weights: log-probabilities of trainer and sampler, the batch."""
    batch = grpo_batch()
    log_prob_BS = torch.where(batch.sequences.targets_BS != -100, -2.0, 0.0).double()
    return log_prob_BS, batch.sampler_log_prob_BS, batch.sequences


def grpo_steps(m):
    policy = grpo_policy()
    optimizer = torch.optim.SGD(policy.parameters(), 0.1)
    return losses(m.train(policy, optimizer, [[grpo_batch()]] * 2, m.GRPOObjective()))


EXAMPLES["grpo"] = {
    "grpo_advantages": lambda m, folder: m.grpo_advantages(normal(8), 4),
    "importance_weights": lambda m, folder: m.importance_weights(*grpo_masks(m), "sequence"),
    "trusted_responses": lambda m, folder: m.trusted_responses(*grpo_masks(m), 1.7),
    "RolloutBatch": lambda m, folder: list(m.RolloutBatch(*grpo_masks(m)).sequences),
    "GRPOObjective": lambda m, folder: list(
        m.GRPOObjective(weight_cap=5.0, error_limit=2.0)(grpo_policy(), grpo_batch())
    ),
    "GPTConfig": lambda m, folder: [m.GPTConfig(hidden_size=32).max_length],
    "Block": lambda m, folder: through(
        filled(m.Block(m.GPTConfig(hidden_size=32))),
        normal(1, 5, 32),
        torch.ones(1, 1, 5, 5, dtype=torch.bool).tril(),
    ),
    "GPT": lambda m, folder: m.GPT(m.GPTConfig(hidden_size=32)).log_probs(grpo_batch().sequences),
    "rollout": lambda m, folder: [
        response.tokens for response in m.rollout(grpo_policy(), [[1, 2], [3]], 2, 4, 11, None)
    ],
    "rollout_batch": lambda m, folder: list(
        m.rollout_batch(grpo_responses(), normal(2), torch.device("cpu")).sequences
    ),
    "shard_dim": lambda m, folder: [m.shard_dim("layers.0.out.weight")],
    "sharded_parameters": lambda m, folder: len(m.sharded_parameters(grpo_policy())),
    "check_tp": lambda m, folder: m.check_tp(m.GPTConfig(), 2) or "it fits",
    "shard_tensor": lambda m, folder: m.shard_tensor(
        "output.weight", normal(16, 4), m.GPTConfig(), 1, 2
    ),
    "shard_state_dict": lambda m, folder: m.shard_state_dict(
        grpo_policy().state_dict(), m.GPTConfig(hidden_size=32), 1, 2
    ),
    "batches_of_age": lambda m, folder: list(m.batches_of_age(float, 3, 1)),
}


def one_rank_mesh(m):
    with alone() as device:
        mesh = m.make_mesh(1, device)
        return [mesh.tp, mesh.dp, mesh.dp_rank]


# Why a function that needs others has no example.
LAUNCHED = "every chapter's tests start it as a script"
WITHOUT_EXAMPLE = {
    "deepspeech": {
        "launch": LAUNCHED,
        "run_rank": "test_launcher.py calls it",
        "time_equivalence": "part of the demonstration; test_01_deepspeech.py runs --check",
        "right_texts": "prints",
        "ring_elements": "counts what two ranks and more send: test_01_deepspeech.py",
    },
    "megatron_tp": {
        "count_all_reduces": "counts what two ranks and more send: test_02_megatron_tp.py",
        "measure": "trains and prints; test_02_megatron_tp.py runs the script",
    },
    "pipeline": {"text_batches": "part of the demonstration; test_03_pipeline.py runs it"},
    "seq_parallel": {
        "measure": "trains and prints; test_04_seq_parallel.py runs the script",
        "text_batches": "part of the demonstration; test_04_seq_parallel.py runs it",
    },
    "mamba_hybrid_tables": {
        "layers": "rows of a table; test_05_tables.py reads all",
        "sizes": "rows of a table; test_05_tables.py reads all",
        "memory": "rows of a table; test_05_tables.py reads all",
        "tables": "rows of tables; test_05_tables.py reads all",
    },
    "mamba_hybrid": {
        "check_case": "part of the demonstration; test_05_mamba_hybrid.py runs it",
        "scan_equivalence": "part of the demonstration; test_05_mamba_hybrid.py runs it",
        "text_batches": "part of the demonstration; test_05_mamba_hybrid.py runs it",
        "choose_sizes": "takes the command line's arguments",
        "gradients": "part of the demonstration; test_05_mamba_hybrid.py runs it",
    },
    "nvfp4": {
        "differing_values": "part of the demonstration; test_08_nvfp4.py runs it",
        "error_of_dgrad": "part of the demonstration; test_08_nvfp4.py runs it",
        "regression": "part of the demonstration; test_08_nvfp4.py runs it",
        "FP8Linear": "chapter 6 has FP8; test_08_nvfp4.py compares this short form",
        "to_fp8": "chapter 6 has FP8; test_08_nvfp4.py compares this short form",
        "spread": "part of the demonstration; test_08_nvfp4.py runs it",
        "text_batches": "part of the demonstration; test_08_nvfp4.py runs it",
        "single_device": "part of the demonstration; test_08_nvfp4.py runs it",
        "measure": "trains and prints; test_08_nvfp4.py runs the script",
        "statements": "part of the demonstration; test_08_nvfp4.py runs the script",
    },
    "compress": dict.fromkeys(
        DEMONSTRATED_10, "part of the demonstration; test_10_compress.py runs it"
    ),
    "preference": {
        "problems": "part of the demonstration; test_11_preference.py runs it",
        "learn": "part of the demonstration; test_11_preference.py runs it",
        "sft": "part of the demonstration; test_11_preference.py runs it",
    },
    "grpo": {
        "made_up_responses": "part of the demonstration; test_12_grpo.py runs it",
        "Learner": "part of the demonstration; test_12_grpo.py runs it",
        "disagreement": "part of the demonstration; test_12_grpo.py runs it",
        "SortDigits": "part of the demonstration; test_12_grpo.py scores with it",
    },
    "moe_fp8": {
        "model_config": "takes the command line's arguments",
        "is_default": "takes the command line's arguments",
        "single_device_losses": "part of the demonstration; test_06_moe_fp8.py runs it",
        "text_batches": "part of the demonstration; test_06_moe_fp8.py runs it",
        "measure": "trains and prints; test_06_moe_fp8.py runs the script",
        "gradients": "part of the demonstration; test_06_moe_fp8.py runs it",
        "parallel_model": "takes the command line's arguments",
        "training": "takes the command line's arguments",
        "uneven_batches": "part of the demonstration; test_06_moe_fp8.py runs it",
    },
    "mtp": {
        "check_case": "part of the demonstration; test_09_mtp.py runs it",
        "text_batches": "part of the demonstration; test_09_mtp.py runs it",
        "measure": "trains and prints; test_09_mtp.py runs the script",
    },
    "zero_3d": {"text_batches": "part of the demonstration; test_07_zero_3d.py runs it"},
}
EXAMPLES["nemotron3"] = {
    "NemotronConfig": lambda m, folder: list(vars(m.NemotronConfig(13, pattern="ME")).values()),
    "Span": lambda m, folder: list(m.Span(None, (2, 3)).layer(1).shape),
    "Mesh": lambda m, folder: [m.Mesh(tp=2, tp_rank=1).tp],
    "make_mesh": lambda m, folder: nemotron_groups(m),
    "all_tokens": lambda m, folder: m.all_tokens(normal(6, 3), nemotron_span()),
    "own_rows": lambda m, folder: m.own_rows(normal(1, 6, 3)),
    "padded_rows": lambda m, folder: m.padded_rows(normal(5, 3)),
    "rows_of_rank": lambda m, folder: m.rows_of_rank(
        nemotron_span(1, 5), nemotron_mesh(tp=2, tp_rank=1)
    ),
    "ExpertLayer": lambda m, folder: of_layers(
        filled(m.ExpertLayer(small_nemotron())), normal(1, 6, 16), nemotron_span()
    ),
    "NemotronLM": lambda m, folder: list(
        m.NemotronLM(small_nemotron()).loss_and_balance(TWO_DOCUMENTS, TWO_DOCUMENTS)
    ),
    "state_shapes": lambda m, folder: [
        math.prod(shape) for shape in m.state_shapes(small_nemotron()).values()
    ],
    "initial_weights": lambda m, folder: [x for _, x in m.initial_weights(small_nemotron())],
    "initialize": lambda m, folder: (
        (model := nemotron(), m.initialize(model)) and [*model.parameters()]
    ),
    "keys_are_replicated": lambda m, folder: [
        m.keys_are_replicated(small_nemotron(attention_heads=4), 4)
    ],
    "sizes_of_rank": lambda m, folder: [m.sizes_of_rank(small_nemotron(), "*", 2).attention_groups],
    "AttentionOfGroup": lambda m, folder: of_layers(
        filled(
            m.AttentionOfGroup(
                small_nemotron(attention_groups=1), 2, nemotron_mesh(tp=4, tp_rank=2)
            )
        ),
        normal(1, 6, 16),
        nemotron_span(),
    ),
    "ParallelExpertLayer": lambda m, folder: of_layers(
        filled(m.ParallelExpertLayer(small_nemotron(), nemotron_mesh())),
        normal(6, 16),
        nemotron_span(),
    ),
    "ParallelBlock": lambda m, folder: of_layers(
        filled(m.ParallelBlock("*", small_nemotron(), nemotron_mesh())),
        normal(6, 16),
        nemotron_span(),
    ),
    "ParallelNemotronLM": lambda m, folder: list(
        m.ParallelNemotronLM(small_nemotron()).loss(TWO_DOCUMENTS, TWO_DOCUMENTS)
    ),
    "placement": lambda m, folder: list(
        vars(m.placement("layers.0.mixer.in_proj.weight", small_nemotron(), 2)).values()
    ),
    "shard_tensor": lambda m, folder: m.shard_tensor(
        "layers.1.mixer.experts.up", normal(4, 6, 8), small_nemotron(), nemotron_mesh(ep=2)
    ),
    "merge_tensor": lambda m, folder: m.merge_tensor(
        "layers.1.mixer.experts.up", [normal(2, 6, 8)] * 2, small_nemotron(), nemotron_mesh(ep=2)
    ),
    "gather_state_dict": lambda m, folder: list(
        m.gather_state_dict(nemotron().state_dict(), nemotron()).values()
    ),
    "check_layout": lambda m, folder: [m.check_layout(small_nemotron(), 2, 4) is None],
    "parameters_by_place": lambda m, folder: [
        len(found) for found in m.parameters_by_place(nemotron()).values()
    ],
    "reduce_gradients": lambda m, folder: (
        (model := nemotron_with_gradients(), m.reduce_gradients(model))
        and [p.grad for p in model.parameters()]
    ),
    "gradient_norm": lambda m, folder: m.gradient_norm(nemotron_with_gradients()),
    "train": lambda m, folder: nemotron_step(m),
}
WITHOUT_EXAMPLE["nemotron3"] = {
    "check_case": "part of the demonstration; test_13_nemotron3.py runs it",
    "configs_of": "takes the command line's arguments",
    "text_batches": "part of the demonstration; test_13_nemotron3.py runs it",
    "training": "takes the command line's arguments",
    "measure": "trains and prints; test_13_nemotron3.py runs the script",
}
# What every chapter has, and every chapter's tests run: the command line and the demonstration.
DEMONSTRATION = {"main", "flags", "config_of", "claims", "check", "equivalence", "demonstrate"}
DEMONSTRATION |= {
    "Options",
    "check_args",
    "RunConfig",
    "parse_flags",
    "make_group",
    "over_all_ranks",
}
DEMONSTRATION |= {"say", "say_setting", "print_claims", "print_errors"}
