"""The repairs that `repair.py` compares: the package's, those of others, and variants that docs/log.md tells about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from blockspin import baselines
from blockspin.repairs import aims
from blockspin.repairs.fitting import Fitting
from blockspin.repairs.projections import Projection, change, num_inputs, with_constant
from blockspin.repairs.report import RepairReport, Step
from blockspin.repairs.run import repair

Repair = Callable[..., RepairReport | None]


def aiming(share: Callable[[float], float], *models_and_samples: Any, **options: Any) -> RepairReport:
    """Another share of what the removed blocks add as the aim of a block's earlier additions."""

    def after(aim: aims.Aim, addition: int) -> Tensor:
        additions = len(aim.streams) - 1
        if addition == additions - 1:
            return aim.wanted.get()
        here, wanted = aim.streams[-1].get().float(), aim.wanted.get().float()
        return aim.streams[addition + 1].get().float() + share((addition + 1) / additions) * (wanted - here)

    with mock.patch.object(aims.Aim, "after", after):
        return repair(*models_and_samples, **options)


def together(*models_and_samples: Any, **options: Any) -> RepairReport:
    """Earlier out-projections of a block bring their part of what all of its out-projections, fitted at once, would."""
    alone = Fitting._refit_projection

    def refit(self: Fitting, block: int, projection: Projection, wanted: Sequence[aims.Aim]) -> Step:
        layer = self.walk.layer
        later = [other for other in self.maps[self.walk.block].projections if other.addition > projection.addition]
        if not later:
            return alone(self, block, projection, wanted)
        names = [each.name for each in (projection, *later)]
        modules = [layer.get_submodule(name) for name in names]
        sums = self._sums(sum(map(num_inputs, modules)), wanted)
        for number, aim in enumerate(wanted):
            seen = self.walk.look(number, names)
            rows = [with_constant(layer.get_submodule(name), seen.inputs[name].flatten(0, -2)) for name in names]
            aimed = aim.wanted.get().to(rows[0].device).float()
            missing = (aimed - seen.additions[-1].float()) / projection.factor
            self._add(sums, number, torch.cat(rows, dim=1), missing.flatten(0, 1), aimed.flatten(0, 1))
        fit = self._solved(sums, self.ridge)
        if fit.helps:
            change(modules[0], fit.solution[: num_inputs(modules[0])])
        return Step(block, projection.name, fit.before, fit.after, fit.helps)

    with mock.patch.object(Fitting, "_refit_projection", refit):
        return repair(*models_and_samples, **options)


def nothing(*models_and_samples: Any, **options: Any) -> None:
    """The plain shortened model."""


OURS = "repair"
OUTWARD = "out-projections only"
BASELINES: dict[str, Repair] = {
    "ReplaceMe": baselines.replaceme,
    "ReplaceMe, cosine": partial(baselines.replaceme, cosine=True),
    "LinearPatch": baselines.linear_patch,
    "Ghosted Layers": baselines.ghosted_layers,
}
TRIED: dict[str, Repair] = {
    "ridge 0.1": partial(repair, ridge=0.1),
    "fitted together": together,
    "ridge 1": partial(repair, ridge=1.0),
    "reading ridge 0.1": partial(repair, reading_ridge=0.1),
    "ridge 0.03": partial(repair, ridge=0.03),
    "reading ridge 0.001": partial(repair, reading_ridge=0.001),
    "aims share 1": partial(aiming, lambda share: 1.0),
    "aims share 0": partial(aiming, lambda share: 0.0),
}
VARIANTS = list(TRIED)
METHODS: dict[str, Repair] = {
    "plain": nothing,
    OURS: repair,
    OUTWARD: partial(repair, reading_ridge=None),
    **BASELINES,
    **TRIED,
}
