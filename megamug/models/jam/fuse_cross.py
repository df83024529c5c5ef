"""What a cross fusion starts from: the parents' towers as they are, new cross blocks, and an output that reads both.

The output's rows of text pieces come from the text parent, all others (image codes and the marks around them) from the
image parent. Each parent's rows can only read its own tower's state, so what the fused model wants at its first step is

    logits = H (mix [s_text; s_image])    with    H mix = [[W_text, 0], [0, W_image]]

W_text [first code, h_text] and W_image [V - first code, h_image] being those rows. Where `output_width` is at least
h_text + h_image this holds exactly: `mix` is the identity (zero rows below), H has the two blocks: a text piece gets
the text parent's logit, an image code the image parent's. Where it is less, as in JAM, H mix is the best approximation
of that rank (Eckart and Young 1936): the right singular vectors of both blocks with the largest singular values of
all, from the eigenvectors of W^T W. (The mean of the two states, the obvious other choice, needs equal widths, and adds
to each logit one of a state that its row was never trained to read.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from megamug.checkpoint.tensors import LazyTensor, TensorReader
from megamug.configuration.sections import Config
from megamug.configuration.shapes import cross_shapes, init_std, output_width
from megamug.models.init import draw
from megamug.models.language.tower import DTYPES

WORDS, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
ROWS = 8192  # of a vocabulary matrix, converted to float64 at a time


def cross_tensors(
    text: TensorReader, image: TensorReader, config: Config, first_code: int, seed: int
) -> Iterator[LazyTensor]:
    """The tensors of a `jam_cross` (`config`, resolved) made of two parents. `seed` draws the cross blocks."""
    dtype = DTYPES[config.precision.dtype]
    shared = config.fusion.shared_embedding

    def copied(reader: TensorReader, name: str) -> Tensor:
        return reader.read(name).to(dtype)

    def table() -> Tensor:
        return torch.cat([text.read(WORDS)[:first_code], image.read(WORDS)[first_code:]]).to(dtype)

    def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
        return draw(name, shape, seed, init_std(config, name)).to(dtype)

    for tower, reader in (("text_tower", text), ("image_tower", image)):
        for name in reader.names:
            if name == OUTPUT or (shared and name == WORDS and tower == "image_tower"):
                continue
            read = table if shared and name == WORDS else partial(copied, reader, name)
            yield LazyTensor(f"{tower}.{name}", reader.shape(name), dtype, read)
    for name, shape in cross_shapes(config).items():
        yield LazyTensor(name, shape, dtype, partial(drawn, name, shape))
    output = Output(text, image, first_code, output_width(config))
    widths, vocabulary = output.widths, text.shape(WORDS)[0]
    yield LazyTensor("mix.weight", (output.width, sum(widths)), dtype, lambda: output.mix().to(dtype))
    yield LazyTensor(OUTPUT, (vocabulary, output.width), dtype, lambda: output.rows(dtype))


@dataclass
class Output:
    """`mix` and the output's rows, of `width`."""

    text: TensorReader
    image: TensorReader
    first_code: int
    width: int

    @cached_property
    def widths(self) -> tuple[int, int]:
        return self.text.shape(WORDS)[1], self.image.shape(WORDS)[1]

    def _rows(self, image: bool) -> Tensor:
        """The rows of the parent's output (of its embedding where that is tied) that the fused output takes over."""
        reader = self.image if image else self.text
        weight = reader.read(OUTPUT if OUTPUT in reader else WORDS)
        return weight[self.first_code :] if image else weight[: self.first_code]

    @cached_property
    def bases(self) -> tuple[Tensor, Tensor]:
        """Directions of the text and of the image state that are kept, [h_text, k] and [h_image, k'], orthonormal."""
        if self.width >= sum(self.widths):
            return torch.eye(self.widths[0]), torch.eye(self.widths[1])
        values, vectors = zip(*(torch.linalg.eigh(_gram(self._rows(image))) for image in (False, True)), strict=True)
        largest = torch.zeros(sum(self.widths), dtype=torch.bool)
        largest[torch.cat(values).argsort(descending=True)[: self.width]] = True
        kept = largest.split(self.widths)
        return tuple(vector[:, k].flip(1).float() for vector, k in zip(vectors, kept, strict=True))

    def mix(self) -> Tensor:
        """[width, h_text + h_image]."""
        text, image = self.bases
        block = torch.block_diag(text.T, image.T)
        return torch.cat([block, block.new_zeros(self.width - len(block), block.shape[1])])

    def rows(self, dtype: torch.dtype) -> Tensor:
        """The output's weight [V, width]."""
        text, image = self.bases
        rows = torch.zeros(self.text.shape(WORDS)[0], self.width, dtype=dtype)
        columns = text.shape[1]
        rows[: self.first_code, :columns] = self._project(False, text, dtype)
        rows[self.first_code :, columns : columns + image.shape[1]] = self._project(True, image, dtype)
        return rows

    def _project(self, image: bool, basis: Tensor, dtype: torch.dtype) -> Tensor:
        rows = self._rows(image)
        # With all directions kept the basis is the identity, and the rows stay as they are to the bit.
        return rows.to(dtype) if self.width >= sum(self.widths) else (rows.float() @ basis).to(dtype)


def _gram(rows: Tensor) -> Tensor:
    """rows^T rows in float64."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for part in rows.split(ROWS):
        total.addmm_(part.double().T, part.double())
    return total
