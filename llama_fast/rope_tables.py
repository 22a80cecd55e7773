"""The tables of a model's rotary embedding, made for the positions in use."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from .config import LlamaConfig
from .ops.rope import rope_table
from .rope_scaling import RopeFunction

FIRST_POSITIONS = 8192  # of the first table: 4 MB at head_dim 128
_growth = threading.Lock()  # of the module: a model can be copied and pickled


def table_rows(positions: int, most: int) -> int:
    """Return the rows of the table for positions, of at most max_position_embeddings."""
    return min(max(1 << (positions - 1).bit_length(), FIRST_POSITIONS), most)


class RopeTables:
    """Tables of a power of two positions, or of all max_position_embeddings. At 4,194,304 positions
    and head_dim 128 the whole table takes 2 GiB.

    Every table is kept, because a CUDA graph holds the address of the one it was captured with.
    Together they have less than twice the rows of the largest.
    """

    def __init__(self, config: LlamaConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        scaling = config.rope_scaling
        # The length of the longest text whose frequencies do not depend on its length.
        self.fixed_length = config.max_position_embeddings
        if isinstance(scaling, RopeFunction) and scaling.rope_type == "dynamic":
            self.fixed_length = min(self.fixed_length, scaling.max_position_embeddings)
        self._tables: list[Tensor] = []  # longer and longer
        self._text: Tensor | None = None  # the last of a longer text

    def upto(self, positions: int) -> Tensor:
        """Return a table, fp32 [n, D], of that many positions or more, or of all the model has. For
        rope type "dynamic", row i is for the last token of a text of i + 1 tokens."""
        positions = min(positions, self._config.max_position_embeddings)
        if not self._tables or len(self._tables[-1]) < positions:
            # The decorator would import torch's compiler, which takes as long as torch itself.
            compiling = torch.compiler.is_compiling()
            (torch.compiler.disable(self._grow) if compiling else self._grow)(positions)
        return self._tables[-1]

    def text(self, length: int) -> Tensor:
        """Return a table for all tokens of a text of that many. It differs from upto(length) for
        rope type "dynamic" beyond the model's first context length."""
        length = min(length, self._config.max_position_embeddings)
        if length <= self.fixed_length:
            return self.upto(length)
        table = self._text
        if table is None or len(table) != length:
            with torch.inference_mode(False):
                self._text = table = rope_table(self._config, length, device=self._device)
        return table

    def _grow(self, positions: int) -> None:
        most = self._config.max_position_embeddings
        with _growth, torch.inference_mode(False):
            if self._tables and len(self._tables[-1]) >= positions:
                return  # another thread did
            rows = table_rows(positions, most)
            table = rope_table(self._config, min(rows, self.fixed_length), device="cpu")
            if rows > self.fixed_length:
                table = torch.cat((table, self._each(self.fixed_length, rows)))
            self._tables.append(table.to(self._device))

    def _each(self, first: int, end: int) -> Tensor:
        """Return rows [first, end), each with the frequencies of a text that ends there."""
        config = self._config
        positions = torch.arange(first, end, device="cpu")[:, None]
        assert isinstance(config.rope_scaling, RopeFunction)
        freqs, factor = config.rope_scaling.frequencies(
            config.rope_theta, config.head_dim, positions + 1
        )
        angles = positions.float() * freqs
        return torch.cat((angles.cos(), angles.sin()), dim=-1) * factor
