"""CUDA graphs of a training step: its kernels start at once, where Python would start them one by one."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tvl_align.contract import Features
from tvl_align.system.console import UserError

WARM_UP = 3  # steps of a shape that run as usual, in which libraries choose their kernels and allocate their memory
MOST_GRAPHS = 4  # shapes of batches that are recorded; each keeps its memory. Others run as usual
Gradients = Callable[[Features, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class _Graph:
    """A recorded step: its graph, the tensors that it reads, the scalars (n,) that it writes, and the gradients of the
    parameters."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    names: list[str]
    scalars: Tensor
    gradients: list[Tensor | None]


class RecordedGradients:
    """`compute(features, kept)`, which sets the gradients of `parameters` and returns named scalars, from CUDA graphs.

    The first WARM_UP calls for a shape of batch run as usual, then one is recorded, and all others replay it: the same
    kernels, whose random numbers follow the seed of the moment. So `compute` must depend on nothing but its arguments, the
    parameters and random numbers of the GPU (Method.recordable). Raises UserError if it cannot be recorded.
    """

    def __init__(self, compute: Gradients, parameters: Iterable[nn.Parameter]) -> None:
        self.compute, self.parameters = compute, list(parameters)
        self.calls: Counter[Hashable] = Counter()
        self.graphs: dict[Hashable, _Graph] = {}
        self.stream: torch.cuda.Stream | None = None

    def __call__(self, features: Features, kept: Tensor) -> dict[str, Tensor]:
        kept = kept.to(features.rows.device, non_blocking=True)
        shape = _shape(features, kept)
        if shape not in self.graphs:
            if len(self.graphs) == MOST_GRAPHS:
                return self.compute(features, kept)
            self.calls[shape] += 1
            if self.calls[shape] <= WARM_UP:
                return self._warm_up(features, kept)
            try:
                self.graphs[shape] = self._record(features, kept)
            except RuntimeError as error:  # the GPU and its allocator may be left in the middle of the recording
                reason = str(error.__context__ or error).strip().splitlines()[0]
                raise UserError(
                    f"the training step cannot be recorded as a CUDA graph ({reason}); give --no_cuda_graphs."
                ) from error
        recorded = self.graphs[shape]
        for mine, given in zip(recorded.inputs, [*features.tensors(), kept], strict=True):
            mine.copy_(given)
        recorded.graph.replay()
        for parameter, gradient in zip(self.parameters, recorded.gradients, strict=True):
            parameter.grad = gradient
        return dict(zip(recorded.names, recorded.scalars.clone().unbind(), strict=True))

    def _warm_up(self, features: Features, kept: Tensor) -> dict[str, Tensor]:
        """As usual, but on another stream than the default one, which cannot be recorded."""
        current = torch.cuda.current_stream(kept.device)
        self.stream = self.stream or torch.cuda.Stream(kept.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            scalars = self.compute(features, kept)
        current.wait_stream(self.stream)
        return scalars

    def _record(self, features: Features, kept: Tensor) -> _Graph:
        mine, own_kept = features.map(torch.clone), kept.clone()
        for parameter in self.parameters:
            parameter.grad = None
        graph = torch.cuda.CUDAGraph()
        # The threads that read and copy the next batches go on meanwhile, so only this thread's calls are restricted.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            found = self.compute(mine, own_kept)
            scalars = torch.stack([value.float() for value in found.values()])
        return _Graph(graph, [*mine.tensors(), own_kept], list(found), scalars, [p.grad for p in self.parameters])


def _shape(features: Features, kept: Tensor) -> Hashable:
    """What must be equal for a replay: modalities, and shapes and types of all tensors."""
    names = [(name, tokens.condensed) for name, tokens in features.modalities.items()]
    return (*names, *features.content_keys, *features.augmented, *((t.shape, t.dtype) for t in [*features.tensors(), kept]))
