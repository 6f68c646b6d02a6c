"""Where pixels lie between the nodes of a 3D table: in which cell, and how far into it along each axis."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from filtrun.lut.schemes import Scheme

CHUNK = 1 << 15
"""Pixels a thread handles at a time: the corner values of a chunk stay in the cache."""
BINS = 1024
"""Equal parts of an axis in which the search among vertices starts."""
NARROWEST = 1e-10
"""Cells count as at least this wide, so that two vertices in one place divide by no zero."""


class Lattice:
    """The nodes of the table or tables `lut` that the pixels of `image` are looked up in.

    Nodes stand at i / (D - 1), or at `vertices`: (3, D) for all images or (N, 3, D), increasing along the last axis.
    """

    def __init__(self, image: Tensor, lut: Tensor, vertices: Tensor | None = None):
        self.size = lut.shape[-1]
        self.step = CHUNK if not image.is_cuda else 1 << 22
        self.own_tables = lut.dim() == 5 and lut.shape[0] > 1
        self.area = image.shape[2] * image.shape[3]
        self.kind = torch.int64 if lut.numel() >= 2**31 else torch.int32
        self.vertices = None
        if vertices is not None:
            self.vertices = vertices.detach().reshape(-1, 3, self.size).contiguous()
            self.widths = F.pad(self.vertices.diff(dim=2).clamp_(min=NARROWEST), (0, 1), value=1.0)
            self.rows = torch.arange(3, dtype=torch.int32, device=lut.device)[:, None]
            # worth it for many pixels; on a GPU it would wait for a number from there
            large = not image.is_cuda and self.area >= 16 * BINS
            self.searches = [_Search(nodes, self.rows) for nodes in self.vertices] if large else None

    def locate(self, pixels: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        """For pixels `start` to `end` of (3, P): cells (3, end - start) int32 and fractions in them, in [0, 1]."""
        if self.vertices is not None:
            return self._between_vertices(pixels, start, end)
        place = pixels[:, start:end].clamp(0, 1).mul_(self.size - 1)
        # NaN has no cell: the clamp of the integers keeps the index in bounds, and the fraction carries the NaN on
        cell = place.to(torch.int32).clamp_(0, self.size - 2)
        return cell, place.sub_(cell)

    def _between_vertices(self, pixels: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        cells, fractions = [], []
        for owner, first, last in self._owners(start, end):
            part = pixels[:, first:last].contiguous()
            cell = self._search(owner, part)
            near, width = self._of_cells(owner, cell)
            cells.append(cell)
            fractions.append((part - near).div_(width).clamp_(0, 1))
        return torch.cat(cells, dim=1), torch.cat(fractions, dim=1)

    def _search(self, owner: int, part: Tensor) -> Tensor:
        """Cells of the pixels (3, P); one at a vertex belongs to the cell below it."""
        assert self.vertices is not None
        if self.searches is not None:
            return self.searches[owner].cells(part)
        return _below(self.vertices[owner], part)

    def _owners(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Stretches (vertices' index, first pixel, last pixel + 1) of one image each, if images have own vertices."""
        assert self.vertices is not None
        if len(self.vertices) == 1:
            yield 0, start, end
            return
        for owner in range(start // self.area, (end - 1) // self.area + 1):
            yield owner, max(start, owner * self.area), min(end, (owner + 1) * self.area)

    def _of_cells(self, owner: int, cell: Tensor) -> tuple[Tensor, Tensor]:
        """Lower end and width of each cell (3, P)."""
        assert self.vertices is not None
        index = (cell + self.rows * self.size).view(-1)
        near, width = (t[owner].view(-1).index_select(0, index).view(cell.shape) for t in (self.vertices, self.widths))
        return near, width

    def corners(self, cell: Tensor, fractions: Tensor, start: int, scheme: Scheme) -> Tensor:
        """Indices (K, P) into the flat tables of the corners around pixels `start` and following."""
        first = (cell[2] * self.size + cell[1]).mul_(self.size).add_(cell[0]).to(self.kind)
        if self.own_tables:
            owner = torch.arange(start, start + cell.shape[1], device=cell.device)
            first += (owner.div_(self.area, rounding_mode="floor") * self.size**3).to(self.kind)
        return scheme.corners(fractions, self.size) + first

    def slopes_in_colour(self, slopes: Tensor, pixels: Tensor, cell: Tensor, start: int) -> Tensor:
        """Derivatives (3, P) by the colours, from those by the fractions; zero beyond the ends of an axis. In place."""
        end = start + cell.shape[1]
        if self.vertices is None:
            part = pixels[:, start:end]
            return slopes.mul_(self.size - 1).mul_((part >= 0) & (part <= 1))
        for owner, first, last in self._owners(start, end):
            here = slice(first - start, last - start)
            nodes, part = self.vertices[owner], pixels[:, first:last]
            slopes[:, here] /= self._of_cells(owner, cell[:, here])[1]
            slopes[:, here] *= (part >= nodes[:, :1]) & (part <= nodes[:, -1:])
        return slopes

    def add_to_vertices(self, total: Tensor, slopes: Tensor, cell: Tensor, fractions: Tensor, start: int) -> None:
        """Add the derivatives by the ends of the cells to `total`, shaped as the vertices.

        A fraction (x - p) / (q - p) moves by -(1 - fraction) / (q - p) with p and by -fraction / (q - p) with q;
        `slopes` are already by the colour, so divided by the width.
        """
        for owner, first, last in self._owners(start, start + cell.shape[1]):
            here = slice(first - start, last - start)
            index = (cell[:, here] + self.rows * self.size).view(-1)
            far = fractions[:, here] * slopes[:, here]
            flat = total[owner].view(-1)
            flat.index_add_(0, index, (far - slopes[:, here]).view(-1))
            flat.index_add_(0, index.add_(1), far.neg_().view(-1))


def _below(nodes: Tensor, x: Tensor) -> Tensor:
    """int32 cells of x (3, P) between nodes (3, D): the last node below x starts the cell, NaN sorts last."""
    return torch.searchsorted(nodes, x, out_int32=True).sub_(1).clamp_(0, nodes.shape[1] - 2)


class _Search:
    """`_below` for many pixels on a CPU: a look at the pixel's bin, then as many steps as vertices can share a bin."""

    def __init__(self, nodes: Tensor, rows: Tensor):
        size = nodes.shape[1]
        edges = torch.arange(BINS + 1, dtype=nodes.dtype, device=nodes.device).div_(BINS).expand(3, -1).contiguous()
        first = _below(nodes, edges)
        self.steps = int(first.diff(dim=1).amax())
        self.bins, self.rows, self.offsets = (first + rows * size).view(-1), rows * size, rows * (BINS + 1)
        inner = nodes.clone()
        inner[:, -1] = torch.inf  # nothing lies in a cell above the last one
        self.nodes = inner.view(-1)

    def cells(self, x: Tensor) -> Tensor:
        place = x.clamp(0, 1).mul_(BINS).to(torch.int32).clamp_(0, BINS)
        cell = self.bins.index_select(0, place.add_(self.offsets).view(-1)).view(x.shape)
        for _ in range(self.steps):
            cell += x > self.nodes.index_select(0, (cell + 1).view(-1)).view(x.shape)
        return cell.sub_(self.rows)
