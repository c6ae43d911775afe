# SPDX-License-Identifier: MIT-0
"""A small use of every function and class that needs others of its chapter, for test_lift.py: chapter, name, use.

A use gets a module, which is the chapter or a lifted copy, and an empty folder; it returns what it computed. A shared
block's functions stand under its home.
"""

import contextlib
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


# ── Chapter 1 ───────────────────────────────────────────────────────────────────────────────────────────


def speech(**changes):
    from deepspeech import SpeechConfig

    return SpeechConfig(
        **(dict(bins=8, convolutions=((2, (3, 3), (1, 2)),), hidden_size=6) | changes)
    )


def utterances():
    """Two of unequal length, as the fields of a Batch."""
    features_BTF = normal(2, 9, 8)
    features_BTF[1, 7:] = 0
    return (
        features_BTF,
        torch.tensor([9, 7]),
        torch.tensor([[3, 4, 4], [5, 6, 0]]),
        torch.tensor([3, 2]),
    )


def net():
    from deepspeech import parallel_model

    return parallel_model(speech()).double()


def spoken():
    return normal(9, 2, 29).log_softmax(-1)


def ring_of(m):
    """GradientRing on its own: what finish() leaves in the gradients."""
    layer = torch.nn.Linear(3, 2).double()
    ring = m.GradientRing(layer.parameters())
    layer(normal(4, 3)).sum().backward()
    ring.finish()
    return [p.grad for p in layer.parameters()]


def recorded(folder):
    """A manifest of one recording."""
    import soundfile

    soundfile.write(folder / "a.wav", np.sin(np.arange(16_000)), 16_000)
    (folder / "a.jsonl").write_text(
        '{"audio_filepath": "a.wav", "duration": 1.0, "text": "one"}', "utf-8"
    )
    return str(folder / "a.jsonl")


def loaded(m, folder):
    from deepspeech import save_model

    save_model(str(folder / "net"), net(), ["one two"])
    model, texts = m.load_model(str(folder / "net"))
    return model.state_dict(), texts


def speech_gradients(m):
    import deepspeech

    model = net()
    ring = deepspeech.GradientRing(model.parameters())
    loss = m.parallel_gradients(model, deepspeech.Batch(*utterances()), ring=ring)
    return [loss, *(p.grad for p in model.parameters())]


def speech_batches():
    import deepspeech

    return [deepspeech.Batch(*utterances())] * 2


def saved(m, folder):
    from deepspeech import load_model

    m.save_model(str(folder / "net"), net(), ["one two"])
    model, texts = load_model(str(folder / "net"))
    return model.state_dict(), texts


def counted(m):
    """The messages of one sum, with Counter on its own."""
    with alone(), m.Counter() as counter:
        dist.all_reduce(normal(3))
    return [(message.op, message.bytes) for message in counter.messages]


# ── Chapter 2 ───────────────────────────────────────────────────────────────────────────────────────────


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


# ── Chapter 3 ───────────────────────────────────────────────────────────────────────────────────────────


def lists(kind="1f1b", stages=2, microbatches=4, chunks=1):
    import pipeline

    return pipeline.schedule(kind, stages, microbatches, chunks)


def one_device():
    from pipeline import Grid

    return Grid()


def stage_of():
    import pipeline

    return pipeline.PipelineStage(pipeline_size()).double()


def pipeline_size():
    from pipeline import GPTConfig

    return GPTConfig(vocab_size=13, seq_length=8, hidden_size=16, num_layers=2, num_heads=2)


def pipeline_gpt():
    from pipeline import GPT

    return GPT(pipeline_size()).double()


def pipeline_step(m):
    import pipeline

    stage = stage_of()
    program = pipeline.programs(lists(stages=1, microbatches=2))[0]
    return m.run_step(stage, program, *BATCHES[0]), [p.grad for p in stage.parameters()]


def pipeline_clip(m):
    stage = stage_of()
    for p in stage.parameters():
        p.grad = torch.ones_like(p)
    return m.clip_grad_norm_(stage, 1.0)


def stage_weights():
    from pipeline import GPT

    return GPT(pipeline_size()).state_dict()


def simulated():
    import pipeline

    return pipeline.simulate(lists())


# ── Chapter 4 ───────────────────────────────────────────────────────────────────────────────────────────


def sp_config():
    from seq_parallel import GPTConfig

    return GPTConfig(vocab_size=13, seq_length=8, hidden_size=16, num_layers=2, num_heads=2)


def sp_gpt():
    from seq_parallel import SequenceParallelGPT

    return SequenceParallelGPT(sp_config()).double()


def sp_attention(m):
    from seq_parallel import unfused_attention

    layer = m.ParallelAttention(sp_config(), None, True, True, unfused_attention)
    return through(layer, normal(5, 2, 16).requires_grad_(), Streams())


def published_model():
    from seq_parallel import PAPER_MODELS

    return PAPER_MODELS["22B"]


def sp_step(m):
    model = sp_gpt()
    return m.train_step(model, optimizer_of(model), *BATCHES[0])


def message(**fields):
    """A message as a counter lists it."""
    import types

    return types.SimpleNamespace(**fields)


# ── Chapter 5 ───────────────────────────────────────────────────────────────────────────────────────────


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
    """x, dt, A, B, C of seven tokens, four heads in two groups."""
    return (
        normal(2, 7, 4, 3),
        torch.rand(2, 7, 4).double(),
        -torch.rand(4).double(),
        *normal(2, 2, 7, 2, 5),
    )


def hybrid_model():
    from mamba_hybrid import ParallelHybridLM

    return ParallelHybridLM(hybrid_config()).double()


def hybrid_weights():
    return hybrid_model().state_dict()


def hybrid_gradients():
    model = hybrid_model()
    model.loss(TOKENS, TOKENS).sum().backward()
    return model


def hybrid_reduced(m):
    model = hybrid_gradients()
    m.reduce_gradients(model)
    return [p.grad for p in model.parameters()]


def hybrid_step(m):
    model = hybrid_model()
    return m.train_step(model, optimizer_of(model), *BATCHES[0])


def published_hybrid(m, folder):
    from test_05_mamba_hybrid import published_folder

    published_folder(folder, sharded=False)
    return m.load_nemotron_h(folder)[1]


def cached(m):
    """What a lifted CachedPast keeps of a scan."""
    kept = dict(state=torch.zeros(2, 4, 3, 5, dtype=torch.float64))
    y = m.CachedPast(0, None, kept).scan(*scan_arguments(), 4, normal(4))
    return y, kept["state"]


def several_grids(m):
    with alone() as device:
        return [(grid.tp, grid.cp) for grid in m.grids(device, 60.0)]


# ── Chapter 6 ───────────────────────────────────────────────────────────────────────────────────────────


def moe_config():
    from moe_fp8 import MoEConfig

    return MoEConfig(
        vocab_size=13, hidden_size=16, expert_size=8, shared_size=8, num_experts=4, pattern="*E*"
    )


def moe(which="ParallelMoELM"):
    import moe_fp8

    return getattr(moe_fp8, which)(moe_config()).double()


def moe_weights():
    return moe("MoELM").state_dict()


def hybrid():
    from moe_fp8 import HYBRID

    return HYBRID


def quantized(x):
    from moe_fp8 import quantize_fp8

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


GPT_1T = dict(layers=128, hidden=25600, heads=160)

BATCHES = [(TOKENS, TOKENS + 1)] * 2
EXAMPLES = {
    "deepspeech": {
        "group_size": lambda m, folder: m.group_size(),
        "group_rank": lambda m, folder: [m.group_rank()],
        "SpeechConfig": lambda m, folder: list(vars(m.SpeechConfig(hidden_size=16)).values()),
        "save_model": lambda m, folder: saved(m, folder),
        "small_batch": lambda m, folder: vars(m.small_batch(3, speech())),
        "synthesize": lambda m, folder: m.synthesize(
            ["one", "two"], 8000, np.random.default_rng(0)
        ).tolist(),
        "Speech": lambda m, folder: vars(
            m.Speech.synthetic(2, speech(), 0).batch([1, 0], speech())
        ),
        "Counter": lambda m, folder: counted(m),
        "RecurrentLayer": lambda m, folder: through(
            m.RecurrentLayer(speech(), 5, Normless, sum_so_far),
            normal(4, 2, 5),
            torch.ones(4, 2, dtype=torch.bool),
        ),
        "DeepSpeech2": lambda m, folder: m.DeepSpeech2(speech()).double()(*utterances()[:2]),
        "plain_gradients": lambda m, folder: m.plain_gradients(net(), speech_batches()[0]),
        "train_alone": lambda m, folder: losses(
            m.train_alone(net(), speech_batches(), lambda step: 1e-3)
        ),
        "plain_recurrence": lambda m, folder: m.plain_recurrence(
            normal(5, 2, 3, 4), normal(2, 4, 4)
        ),
        "gru": lambda m, folder: m.gru(normal(5, 2, 3, 12), normal(2, 4, 12)),
        "parallel_model": lambda m, folder: m.parallel_model(speech()).double()(*utterances()[:2]),
        "load_model": lambda m, folder: loaded(m, folder),
        "ctc_loss": lambda m, folder: m.ctc_loss(spoken(), utterances()[2], *utterances()[1::2]),
        "ring_all_reduce": lambda m, folder: m.ring_all_reduce(normal(5)),
        "GradientRing": lambda m, folder: ring_of(m),
        "sum_over_ranks": lambda m, folder: m.sum_over_ranks(normal(3)),
        "SequenceBatchNorm": lambda m, folder: through(
            m.SequenceBatchNorm(4), normal(5, 2, 4), torch.arange(5)[:, None] < torch.tensor([5, 3])
        ),
        "clipped_recurrence": lambda m, folder: m.clipped_recurrence(
            normal(5, 2, 3, 4), normal(2, 4, 4)
        ),
        "time_parallel_birnn": lambda m, folder: m.time_parallel_birnn(
            normal(5, 3, 4), normal(2, 4, 4)
        ),
        "greedy": lambda m, folder: m.greedy(spoken()[:, 0]),
        "beam_search": lambda m, folder: m.beam_search(spoken()[:, 0], beam=4),
        "check_replicas": lambda m, folder: m.check_replicas(net()) or "no other rank",
        "parallel_gradients": lambda m, folder: speech_gradients(m),
        "train": lambda m, folder: losses(m.train(net(), speech_batches(), lambda step: 1e-3)),
        "distort": lambda m, folder: m.distort(
            torch.randn(4000), speech(), np.random.default_rng(0)
        ),
        "read_manifest": lambda m, folder: [
            said.text for said in m.read_manifest(recorded(folder))
        ],
        "load_audio": lambda m, folder: m.load_audio(
            str(Path(recorded(folder)).parent / "a.wav"), 8000
        ),
        "log_spectrogram": lambda m, folder: m.log_spectrogram(normal(4000), 8000, 8),
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
        "train": lambda m, folder: losses(m.train(*with_optimizer(gpt()), BATCHES, mesh_of_one())),
        "TextData": lambda m, folder: text_of(m, folder),
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
        "dropout": lambda m, folder: m.dropout(normal(40), 0.5),
        "core_attention": lambda m, folder: m.core_attention(*normal(3, 2, 2, 5, 4), p=0.5),
        "Attention": lambda m, folder: through(
            m.Attention(pipeline_size()), normal(2, 5, 16), Streams()
        ),
        "MLP": lambda m, folder: through(m.MLP(pipeline_size()), normal(2, 5, 16), Streams()),
        "Block": lambda m, folder: through(
            m.Block(pipeline_size(), Sublayer(), Sublayer()), normal(2, 5, 16), Streams()
        ),
        "GPT": lambda m, folder: through(m.GPT(pipeline_size()), TOKENS),
        "parameter_shapes": lambda m, folder: list(m.parameter_shapes(pipeline_size()).values()),
        "initial_weights": lambda m, folder: dict(m.initial_weights(pipeline_size())),
        "train_alone": lambda m, folder: losses(
            m.train_alone(pipeline_gpt(), BATCHES, lambda step: 1e-3)
        ),
        "GPTConfig": lambda m, folder: vars(m.GPTConfig(hidden_size=16, num_heads=2)),
        "join_from_wire": lambda m, folder: m.join_from_wire(normal(6), (3, 2)),
        "sum_over": lambda m, folder: m.sum_over(None, [normal(3)]) or "one rank",
        "Grid": lambda m, folder: vars(m.Grid()),
        "chunks_of": lambda m, folder: m.chunks_of(lists("interleaved", 2, 4, 2)),
        "Bar": lambda m, folder: m.Bar(lists()[0][0], 0, 1),
        "Timeline": lambda m, folder: m.Timeline(simulated().ranks).bubble,
        "draw": lambda m, folder: m.draw(simulated()),
        "Hop": lambda m, folder: m.Hop(0, 1, lists()[0][0]),
        "Step": lambda m, folder: m.Step(lists()[0][0], ()),
        "schedule": lambda m, folder: m.schedule("interleaved", 2, 4, 2),
        "input_of": lambda m, folder: m.input_of(lists()[1][0], 1, 2, 1),
        "needs": lambda m, folder: m.needs(lists()[1][0], 1, 2, 1),
        "count_targets": lambda m, folder: m.count_targets(TOKENS),
        "play": lambda m, folder: m.play(lists(), dict(F=1, B=2)),
        "simulate": lambda m, folder: m.simulate(lists()),
        "programs": lambda m, folder: m.programs(lists("interleaved", 2, 4, 2)),
        "verify": lambda m, folder: m.verify(lists()),
        "verify_programs": lambda m, folder: (
            m.verify_programs(__import__("pipeline").programs(lists())) or "proven"
        ),
        "PipelineStage": lambda m, folder: list(
            m.PipelineStage(pipeline_size(), 1, 2).parameters()
        ),
        "random_streams": lambda m, folder: torch.rand(3, generator=m.random_streams(0, 1).outside),
        "cut_for_wire": lambda m, folder: m.cut_for_wire(normal(3, 2)),
        "Mailbox": lambda m, folder: len(vars(m.Mailbox(one_device(), torch.float32, "cpu", None))),
        "run_step": lambda m, folder: pipeline_step(m),
        "shard_state_dict": lambda m, folder: m.shard_state_dict(
            stage_weights(), pipeline_size(), 1, 2
        ),
        "merge_state_dicts": lambda m, folder: m.merge_state_dicts(
            [stage_weights()], pipeline_size()
        ),
        "make_grid": one_grid,
        "clip_grad_norm_": lambda m, folder: pipeline_clip(m),
        "train": lambda m, folder: losses(
            m.train(stage_of(), lists(stages=1, microbatches=2), BATCHES, lambda step: 1e-3)
        ),
        "training_days": lambda m, folder: m.training_days(300e9, 1024, 140e12, 96, 12288),
        "predict": lambda m, folder: m.predict(**GPT_1T, batch=3072, t=8, p=64, d=6, v=1, b=1),
        "plan": lambda m, folder: m.plan(**GPT_1T, gpus=3072, batch=3072),
    },
    "seq_parallel": {
        "activation_bytes": lambda m, folder: m.activation_bytes(sp_config(), 2, True, "selective"),
        "wire_bytes": lambda m, folder: m.wire_bytes([message(op="all_reduce", bytes=8)], 2),
        "gather_from_sp": lambda m, folder: m.gather_from_sp(normal(4, 2, 3)),
        "reduce_scatter_to_sp": lambda m, folder: m.reduce_scatter_to_sp(normal(4, 2, 3)),
        "scatter_to_sp": lambda m, folder: m.scatter_to_sp(normal(4, 2, 3)),
        "SPColumnParallelLinear": lambda m, folder: through(
            m.SPColumnParallelLinear(4, 6), normal(3, 2, 4)
        ),
        "SPRowParallelLinear": lambda m, folder: through(
            m.SPRowParallelLinear(4, 6), normal(3, 2, 4)
        ),
        "unfused_attention": lambda m, folder: m.unfused_attention(*normal(3, 4, 5, 2), p=0.5),
        "recompute": lambda m, folder: m.recompute(torch.sin, normal(3).requires_grad_()),
        "ParallelAttention": lambda m, folder: sp_attention(m),
        "SequenceParallelLayer": lambda m, folder: through(
            m.SequenceParallelLayer(sp_config(), recompute="selective"),
            normal(5, 2, 16).requires_grad_(),
            Streams(),
        ),
        "random_streams": lambda m, folder: torch.rand(3, generator=m.random_streams(0, 1).outside),
        "look_up": lambda m, folder: m.look_up(TOKENS.T, normal(13, 4), 13),
        "SequenceParallelGPT": lambda m, folder: through(
            m.SequenceParallelGPT(sp_config()), TOKENS
        ),
        "reduce_sequence_parallel_grads": lambda m, folder: (
            m.reduce_sequence_parallel_grads(sp_gpt()) or "one rank"
        ),
        "train_step": lambda m, folder: sp_step(m),
        "train": lambda m, folder: losses(m.train(sp_gpt(), BATCHES, lambda step: 1e-3)),
        "TransformerLayer": lambda m, folder: through(
            m.TransformerLayer(sp_config()), normal(2, 5, 16), Streams()
        ),
        "column_parallel": lambda m, folder: m.column_parallel(
            normal(3, 2, 4), normal(6, 4), None, None, True
        ),
        "sum_over_tp": lambda m, folder: m.sum_over_tp(normal(3, 2, 4), None, True),
        "ParallelMLP": lambda m, folder: through(
            m.ParallelMLP(sp_config(), None, True), normal(5, 2, 16).requires_grad_(), Streams()
        ),
        "saved_bytes": lambda m, folder: [
            kept.bytes for kept in m.saved_bytes(normal(3).requires_grad_().exp)
        ],
        "published_config": lambda m, folder: vars(m.published_config(published_model())),
        "first_stage_bytes": lambda m, folder: m.first_stage_bytes(
            published_model(), True, "selective"
        ),
        "extra_bytes": lambda m, folder: m.extra_bytes(published_model()),
        "stage_output_bytes": lambda m, folder: m.stage_output_bytes(published_model()),
        "paper_scale": lambda m, folder: [cost.kept for cost in m.paper_scale("22B")],
        "layer_costs": lambda m, folder: [cost.kept for cost in m.layer_costs(sp_config(), 2)],
    },
    "mamba_hybrid": {
        "HybridConfig": lambda m, folder: list(vars(m.HybridConfig()).values()),
        "grids": lambda m, folder: several_grids(m),
        "segsum": lambda m, folder: m.segsum(normal(3, 5)),
        "log_decay": lambda m, folder: m.log_decay(
            -normal(2, 7, 4).abs(), normal(4).abs(), normal(2, 7) > 1
        ),
        "ssd_recurrent": lambda m, folder: m.ssd_recurrent(*scan_arguments()),
        "ssd_quadratic": lambda m, folder: m.ssd_quadratic(*scan_arguments()),
        "ssd": lambda m, folder: m.ssd(*scan_arguments(), 3),
        "causal_conv1d": lambda m, folder: m.causal_conv1d(
            normal(2, 7, 3), normal(3, 4), normal(3)
        ),
        "Past": lambda m, folder: m.Past().scan(*scan_arguments(), 3, normal(4)),
        "RMSNorm": lambda m, folder: through(m.RMSNorm(8, groups=2), normal(2, 5, 8)),
        "Mamba2Mixer": lambda m, folder: through(m.Mamba2Mixer(hybrid_config()), normal(2, 5, 16)),
        "rotate": lambda m, folder: m.rotate(normal(2, 4, 5, 8), 3, 0.5),
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
        "CachedPast": lambda m, folder: cached(m),
        "Cache": lambda m, folder: [vars(past) for past in m.Cache(2, 8).admit(TOKENS)],
        "local_config": lambda m, folder: vars(m.local_config(hybrid_config(), 2)),
        "ParallelRMSNorm": lambda m, folder: through(
            m.ParallelRMSNorm(8, 1e-5, 2, __import__("mamba_hybrid").Grid()), normal(2, 5, 8)
        ),
        "ssd_sequence_parallel": lambda m, folder: m.ssd_sequence_parallel(*scan_arguments(), 3),
        "halo": lambda m, folder: m.halo(normal(2, 5, 3), 3),
        "from_earlier_ranks": lambda m, folder: m.from_earlier_ranks(normal(2, 5, 3)),
        "RankPast": lambda m, folder: m.RankPast(lengths=[7]).scan(*scan_arguments(), 3, normal(4)),
        "ParallelHybridLM": lambda m, folder: through(m.ParallelHybridLM(hybrid_config()), TOKENS),
        "pieces_of": lambda m, folder: m.pieces_of(
            "layers.0.mixer.in_proj.weight", hybrid_config(), 1, 2
        ),
        "shard_tensor": lambda m, folder: m.shard_tensor(
            "layers.0.mixer.dt_bias", normal(4), hybrid_config(), 1, 2
        ),
        "shard_state_dict": lambda m, folder: m.shard_state_dict(
            hybrid_weights(), hybrid_config(), 1, 2
        ),
        "merge_state_dicts": lambda m, folder: m.merge_state_dicts(
            [hybrid_weights()], hybrid_config()
        ),
        "load_nemotron_h": published_hybrid,
        "gradient_pieces": lambda m, folder: [
            part for _, part, _ in m.gradient_pieces(hybrid_gradients())
        ],
        "reduce_gradients": lambda m, folder: hybrid_reduced(m),
        "grad_norm": lambda m, folder: m.grad_norm(hybrid_gradients()),
        "train_step": lambda m, folder: hybrid_step(m),
        "train": lambda m, folder: losses(m.train(hybrid_model(), BATCHES, lambda step: 1e-3)),
        "parameters": lambda m, folder: m.parameters(hybrid_config()),
        "generate": lambda m, folder: m.generate(hybrid_model(), TOKENS, 4),
        "make_grid": one_grid,
        "decode_memory": lambda m, folder: list(m.decode_memory(hybrid_config(), 100)),
    },
    "moe_fp8": {
        "MoEConfig": lambda m, folder: list(vars(m.MoEConfig()).values()),
        "Layer": lambda m, folder: list(
            m.Layer(moe_config(), mixer()).double()(normal(2, 5, 16), normal(2))
        ),
        "fp8_hardware": lambda m, folder: m.fp8_hardware("auto", torch.device("cpu"), hybrid()),
        "overload": lambda m, folder: m.overload(moe("MoELM")).state_dict(),
        "Router": lambda m, folder: list(m.Router(moe_config()).double()(normal(5, 16))),
        "update_expert_bias": lambda m, folder: moe_update(m),
        "grouped_gemm": lambda m, folder: m.grouped_gemm(normal(5, 3), normal(2, 4, 3), [2, 3]),
        "Experts": lambda m, folder: through(m.Experts(2, 3, 4), normal(5, 3), [2, 3]),
        "MoELayer": lambda m, folder: list(m.MoELayer(moe_config()).double()(normal(2, 5, 16))),
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
        "ExpertParallelMoELayer": lambda m, folder: list(
            m.ExpertParallelMoELayer(moe_config()).double()(normal(2, 5, 16))
        ),
        "ParallelMoELM": lambda m, folder: list(m.ParallelMoELM(moe_config()).double()(TOKENS)),
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
}

# Why a function that needs others has no example.
LAUNCHED = "every chapter's tests start it as a script"
WITHOUT_EXAMPLE = {
    "deepspeech": {
        "launch": LAUNCHED,
        "run_rank": "test_launcher.py calls it",
        "transcribe": "takes the command line's arguments; test_01_deepspeech.py runs the flags",
        "report": "prints",
        "use_model": "prints; test_01_deepspeech.py runs --evaluate and --transcribe",
    },
    "megatron_tp": {
        "count_all_reduces": "counts what two ranks and more send: test_02_megatron_tp.py",
        "measure": "trains and prints; test_02_megatron_tp.py runs the script",
    },
    "pipeline": {
        "plan_command": "prints; test_03_pipeline.py runs it",
        "draw_step": "prints",
        "losses_alone": "part of the demonstration; test_03_pipeline.py runs it",
    },
    "seq_parallel": {
        "print_costs": "prints",
        "show_layer": "prints",
        "print_paper_scale": "prints",
        "losses_alone": "part of the demonstration; test_04_seq_parallel.py runs it",
    },
    "mamba_hybrid": {
        "largest_tp": "takes the command line's arguments",
        "time_decoding": "measures time",
        "count_messages": "counts what two ranks and more send: test_05_mamba_hybrid.py",
        "decode_times": "measures time",
    },
    "moe_fp8": {
        "model_config": "takes the command line's arguments",
        "fp8_recipe": "takes the command line's arguments",
        "is_default": "takes the command line's arguments",
        "single_device_losses": "part of the demonstration; test_06_moe_fp8.py runs it",
        "text_batches": "part of the demonstration; test_06_moe_fp8.py runs it",
        "measure": "trains and prints; test_06_moe_fp8.py runs the script",
    },
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
