"""Training: images and masks in, weights out.

>>> from fastunet import FastUNet, train
>>> data = train.find("dsb2018", channels=1, classes=2)  # checks every file  # doctest: +SKIP
>>> train.fit(FastUNet(norm="batch"), data, "run", train.Settings(steps=3000))  # doctest: +SKIP
"""

from .data import Data, DataError, Pair, find
from .loop import Point, fit
from .loss import segmentation_loss
from .processes import Processes, processes
from .settings import DivergedError, Settings, TrainingError

__all__ = [
    "Data",
    "DataError",
    "DivergedError",
    "Pair",
    "Point",
    "Processes",
    "Settings",
    "TrainingError",
    "find",
    "fit",
    "processes",
    "segmentation_loss",
]
