# SPDX-License-Identifier: MIT-0
"""Answers to the hunt: the guilty function under other names, and functions that are innocent."""

RIGHT = [
    ("1", "with its module", 'answer = "megatron_tp.vocab_parallel_cross_entropy"\n'),
    ("2", "with parentheses", 'answer = "clip_grad_norm_()"\n'),
    ("3", "the method", 'answer = "RowParallelLinear.forward"\n'),
    ("4", "the Function", 'answer = "_SumOverRanks.backward"\n'),
    ("5", "the method of its class", 'answer = "PipelineStage.tied_copies"\n'),
    ("6", "with spaces", 'answer = " reduce_sequence_parallel_grads "\n'),
    ("7", "the function itself", "import context_parallel\n\nanswer = context_parallel.halo\n"),
    ("8", "with its module", 'answer = "moe_fp8.reduce_gradients"\n'),
]

WRONG = [
    ("1", "nothing", 'answer = ""\n'),
    ("1", "a function that calls it", 'answer = "ParallelGPT.loss"\n'),
    ("2", "the optimizer", 'answer = "AdamW"\n'),
    ("3", "the other layer", 'answer = "ColumnParallelLinear"\n'),
    ("3", "part of a name", 'answer = "Linear"\n'),
    ("4", "the ring", 'answer = "GradientRing"\n'),
    ("5", "the loop", 'answer = "train"\n'),
    ("6", "an operator", 'answer = "gather_from_sp"\n'),
    ("7", "the scan", 'answer = "ssd"\n'),
    ("8", "None", "answer = None\n"),
    ("8", "a number", "answer = 8\n"),
]
