"""The embedded model, and text that it was not trained on. The model's card is model/README.md."""

from pathlib import Path

_FOLDER = Path(__file__).parent

MODEL = str(_FOLDER / "model")
CALIBRATION = str(_FOLDER / "calibration.txt")
VALIDATION = str(_FOLDER / "validation.txt")
