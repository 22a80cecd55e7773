"""Tests of the configurations that Triton's kernels offer to each chip, without a launch."""

from __future__ import annotations

import itertools

from llama_fast.kernels import attention, decode_plan, fp8_stream, linear
from llama_fast.kernels.common import CHIPS


def test_attention_offers_every_chip_something() -> None:
    for chip in CHIPS.values():
        for dtype in ("bfloat16", "float16", "float32"):
            for d in range(8, 257, 8):
                assert attention._configs(chip, dtype, d)


def test_splits_of_keys_fill_the_chip() -> None:
    """Fill 264 slots from 8 key/value heads: 32 splits are 97 % of a wave, 33 are two waves."""
    assert decode_plan.most_splits(8, 264) == 32
    assert decode_plan.most_splits(1, 264) == 251
    assert decode_plan.most_splits(128, 132) == 1
    for programs in range(1, 600):
        splits = decode_plan.most_splits(programs, 264)
        assert splits >= 1 and (splits == 1 or programs * splits <= 4 * 264)


def test_f36_fp8_configurations_fit_and_are_few() -> None:
    for chip, n in itertools.product(CHIPS.values(), (64, 4096, 14336, 128256)):
        for few, x_bytes, fits in itertools.product((True, False), (1, 2, 4), (True, False)):
            offered = fp8_stream._configs(chip, few, n, 4096, x_bytes, fits)
            assert 1 <= len(offered) <= 3
            for config in offered:  # stages and 1 KB bound what was compiled
                assert 1 <= config["SPLITS"] <= 16
        for m, out_bytes in itertools.product((128, 8192), (2, 4)):
            assert linear._configs(chip, m, n, False, out_bytes)


def test_splits_of_k_fill_the_chip() -> None:
    """Split 4096 x 4096, with its 64 tiles of 64 features, in two for 132 SMs; 14336 in none."""
    chip = CHIPS["sm_90"]
    for n, splits in ((4096, 2), (14336, 1), (28672, 1), (128256, 1)):
        assert fp8_stream._configs(chip, True, n, 4096, 1, True)[0]["SPLITS"] == splits
