"""Errors and classes, by hand."""

from __future__ import annotations

import torch

from fastunet.parity.measures import distance, error_map, segmentation


def test_errors_by_hand():
    truth = torch.tensor([3.0, 4.0, torch.inf, 1.0], dtype=torch.float64)
    found = distance(torch.tensor([3.5, 4.0, torch.inf, torch.nan]), truth)
    assert (found.max, found.mean, found.relative_l2) == (0.5, 0.25, 0.1)  # 0.5 beside the norm of (3, 4)


def test_classes_of_several_channels_by_hand():
    # Four pixels of the classes 1, 1, 2 and 0; the second and the third are taken for 0.
    truth = torch.tensor([[0, 4, 0], [0, 2, 0], [0, 1, 2], [3, 0, 0]], dtype=torch.float64)
    logits = truth.clone()
    logits[1, 0], logits[2, 0] = 2.5, 2.25
    found = segmentation(logits.T.reshape(1, 3, 2, 2), truth.T.reshape(1, 3, 2, 2))
    assert (found.flips, found.pixels) == (2, 4)
    assert found.dice == (2 / 3, 0.0)  # class 1: one found of two; class 2: lost
    assert found.iou == (1 / 2, 0.0)
    assert (found.median_margin, found.margin) == (1.0, 2.0)


def test_a_single_channel_is_cut_at_its_threshold():
    truth = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64).reshape(1, 1, 2, 2)
    logits = torch.tensor([0.1, 0.6, 0.6, 0.9]).reshape(1, 1, 2, 2)
    found = segmentation(logits, truth, threshold=0.5)
    assert (found.flips, found.dice, found.iou) == (1, (4 / 5,), (2 / 3,))
    assert abs(found.margin - 0.1) < 1e-9
    assert segmentation(logits, truth).flips == 0  # above 0 all are foreground


def test_where_a_class_is_not_there_nothing_is_lost():
    empty = torch.full((1, 1, 2, 2), -1.0)
    found = segmentation(empty, empty.double())
    assert (found.flips, found.dice, found.iou) == (0, (1.0,), (1.0,))


def test_the_map_has_the_largest_error_of_a_pixel():
    truth = torch.zeros(1, 2, 1, 2, dtype=torch.float64)
    logits = torch.tensor([[1.0, -3.0], [2.0, 0.0]]).reshape(1, 2, 1, 2)
    assert error_map(logits, truth).tolist() == [[[2.0, 3.0]]]
