# SPDX-License-Identifier: MIT-0
"""Project 3. A paper's table: how many days does training take? Fill in `days`.

    cp notebooks/projects/days.py mine.py
    make project PROJECT=3 FILE=mine.py

Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM, Narayanan et al.,
2021, arXiv 2104.04473, prints in table 2 how long GPT models of 175 and 530 billion parameters
train on 300 billion tokens. Compute its twelve figures from the shape of the model and the speed of
a GPU, which the table has too.

The model is a GPT (chapter 2) with attention to all tokens, as the paper counts it. Each layer is
computed anew in backward; the output layer is not.

`make project` compares with the printed days, whose TFLOP/s are rounded. It also asks for models
that are in no table, of another vocabulary and sequence length, within 0.5 %.
"""


def days(
    layers: int, hidden: int, vocab: int, seq: int, gpus: int, tflops: float, tokens: float
) -> float:
    """Days of training on `tokens` tokens.

    Args: vocab: entries of the output layer. seq: tokens of a sequence. tflops: of each GPU, all
        operations counted that it does, the recomputed ones too.
    """
    raise NotImplementedError("fill in days")
