"""The sweep that looks at two texts: what the task wants of a layer's inputs, and what knowledge makes of them.

While a block is walked for the task, knowledge text goes through it forwards. A layer's two moments are those of the task's
inputs, each times the norm of the gradient at its output, and of the inputs on knowledge text; both `[n, n]`, and gone with the block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from farss import processes
from farss.artifacts import Layer, Survey
from farss.files import fingerprint
from farss.maths.fisher import output_energy
from farss.maths.moments import Moment
from farss.memory import give_back_if_scarce
from farss.models import weights_fingerprint
from farss.places import Batch
from farss.survey.kept import KNOWLEDGE
from farss.survey.passage import Passage, real_count, through
from farss.survey.site import Site
from farss.survey.statistics import (
    Readout,
    add_up_moments,
    check_counts,
    finite_moment,
    finite_weight,
    recording_inputs,
    recording_pull,
    sums_of,
)
from farss.survey.sweep import Sweep, carry_out, check_share, real_tokens

Read = Callable[..., dict[str, Tensor]]
"""(weight [m, n], how many directions at an end, *moments [n, n]) -> `artifacts.layer_tensors`. There is a moment for each text that is
looked at."""


def against(site: Site, task: list[Batch], knowledge: list[Batch], read: Read) -> Survey:
    """Read every target layer by what the task wants of it and what knowledge makes of it.

    Arguments and errors are those of `farss.survey.survey`, and `read` says what is kept of a layer.
    """
    key = reading_key(site, read, [*task, *knowledge])
    site = replace(site, meta={**site.meta, "knowledge_tokens": real_count(knowledge)})
    return carry_out(partial(Against, read=read, knowledge=knowledge), site, task, key, beside=knowledge)


def reading_key(site: Site, read: Read, batches: list[Batch], *more: str) -> str:
    """Hash of everything a reading's numbers depend on."""
    name, weights = f"{read.__module__}.{read.__qualname__}", weights_fingerprint(site.model)
    return fingerprint([name, weights, list(site.layers), real_tokens(batches), *more])


@dataclass(kw_only=True)
class Against(Sweep):
    """The task's moments against those of knowledge."""

    read: Read
    knowledge: list[Batch]
    """Of all processes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.knowledge)

    @cached_property
    def texts(self) -> list[Passage]:
        """This process's share of the knowledge text, embedded."""
        return self.share(self.knowledge, KNOWLEDGE)

    def announce(self, batches: list[Batch]) -> None:
        """The knowledge text's inputs are kept too."""
        super().announce([*batches, *self.knowledge])

    def forwards(self, passages: list[Passage]) -> None:
        """Send both texts through every block, and the task through the loss."""
        self.through_all(self.texts, KNOWLEDGE)
        super().forwards(passages)

    def look(
        self, index: int, passages: list[Passage], inside: dict[str, Layer], modules: dict[str, nn.Module]
    ) -> tuple[list[Tensor], dict[str, Readout]]:
        """Collect both moments of the layers inside a block, and read their directions; see `Sweep.look`."""
        task, knowledge = ({name: Moment(sums_of(module)) for name, module in modules.items()} for _ in range(2))
        with self.timed("statistics"):
            gradients = self.walk(index, passages, lambda mask: recording_pull(modules, task, mask))
            for text, state in zip(self.texts, self.kept.read(KNOWLEDGE, index), strict=True):
                with torch.no_grad(), recording_inputs(modules, knowledge, text.mask):
                    through(self.site.blocks[index], index, text, state)
            add_up_moments([*task.values(), *knowledge.values()])
        tokens = real_count(self.knowledge)
        found = {}
        with self.timed("directions"):
            for place, (name, layer) in enumerate(inside.items()):
                pulled, seen = task.pop(name), knowledge.pop(name)  # of a wide layer each is gigabytes
                check_counts(name, "gradient", pulled, self.tokens)
                check_counts(name, "token", seen, tokens)
                if place % processes.size() == processes.rank():
                    weight, pull = finite_weight(layer, modules[name]), finite_moment(name, "gradients", pulled.mean)
                    energy = finite_moment(name, "activations", seen.mean)
                    del pulled, seen
                    give_back_if_scarce(self.site.place)
                    found[name] = Readout(output_energy(weight, pull), self.read(weight, self.site.cap, pull, energy))
        return gradients, found
