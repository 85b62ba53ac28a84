"""Names and patterns in quantisation settings follow the layers."""

from __future__ import annotations

import pytest

from blockspin.surgery.patterns import ModuleSettings
from blockspin.surgery.renaming import Renaming


def test_names_in_quantisation_settings_follow_the_layers() -> None:
    value = {
        "modules_to_not_convert": ["lm_head", "backbone.layers.0.mixer", "backbone.layers.12.mixer.conv1d"],
        "ignore": [r"re:backbone\.layers\.2\..*", r"re:.*layers\.1\..*", "re:.*layers.[0-2].mixer", "*.layers.14.*"],
        "targets": [r"re:.*layers\.(?:1|11)\.mixer", r"re:.*layers\.\d+\.mlp", "model.layers.1[0-2]*"],
        "dynamic": {r"-:backbone\.layers\.1\.mixer": {"bits": 8}, r"+:backbone\.layers\.2\.mixer.experts.1": {}},
        "weight_block_size": [128, 128],
    }
    kept = [0, 2, *range(4, 13)]
    assert ModuleSettings(Renaming(kept, depth=13), "model.layers").rewritten(value) == {
        "modules_to_not_convert": ["lm_head", "backbone.layers.0.mixer", "backbone.layers.10.mixer.conv1d"],
        "ignore": [
            r"re:backbone\.layers\.1\..*",
            "re:.*layers.0.mixer",
            "re:.*layers.1.mixer",
            "*.layers.12.*",  # beyond the stack: for multi-token prediction
        ],
        "targets": [
            r"re:.*layers\.9\.mixer",
            r"re:.*layers\.\d+\.mlp",
            "model.layers.8*",
            "model.layers.9*",
            "model.layers.10*",
        ],
        "dynamic": {r"+:backbone\.layers\.1\.mixer.experts.1": {}},
        "weight_block_size": [128, 128],
    }


def test_settings_that_cannot_be_rewritten_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be rewritten"):
        ModuleSettings(Renaming([0, 2], depth=3), "layers").rewritten({"only": "re:layers.[02].mlp"})


def test_names_of_other_lists_in_quantisation_settings_stay() -> None:
    names = [
        "vision_tower.encoder.layers.1.fc1",
        "model.vision_tower.encoder.layers.0",
        "language_model.model.layers.1.q",
    ]
    others = ["model.vision_tower.encoder.layers"]
    renumbered = ModuleSettings(Renaming([1, 2], depth=3), "model.language_model.layers", others).rewritten(names)
    assert renumbered == [*names[:2], "language_model.model.layers.0.q"]
