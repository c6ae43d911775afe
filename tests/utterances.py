# SPDX-License-Identifier: MIT-0
"""Utterances of noise for the tests of chapter 1: any lengths, an empty text, a repeat."""

import deepspeech as ds
import torch


def small_batch(utterances: int, config: ds.DeepSpeechConfig, seed: int = 1) -> ds.Batch:
    """Very unequal lengths; the first text is empty, the last begins with two equal labels."""
    generator = torch.Generator().manual_seed(seed)
    frames_B = torch.randint(14, 40, (utterances,), generator=generator)
    sizes_B = torch.randint(1, 5, (utterances,), generator=generator)
    sizes_B[0] = 0
    labels_BU = torch.randint(1, len(config.alphabet), (utterances, 5), generator=generator)
    labels_BU[-1, 1] = labels_BU[-1, 0]
    features_BTF = torch.randn(utterances, 40, config.num_bins, generator=generator)
    features_BTF *= ds.valid_frames(frames_B, 40).T[..., None]
    return ds.Batch(features_BTF, frames_B, labels_BU, sizes_B).rows(range(utterances))
