"""Random views of images."""

import numpy as np
import pytest

from fltac.data.augment import Views, draw_views, seen
from fltac.seeding import generator


def view(down: float, right: float, mirrored: bool) -> Views:
    return Views(np.array([down]), np.array([right]), np.array([mirrored]))


PIXELS = np.arange(1, 3 * 8 * 16 + 1, dtype=np.float32).reshape(1, 3, 8, 16)
"""Of 8 x 16 pixels: moved by up to one row and two columns."""


@pytest.mark.parametrize(
    ("down", "right", "rows", "columns"),
    [(0.5, 0.5, 0, 0), (0.0, 0.0, -1, -2), (0.99, 0.99, 1, 2), (0.34, 0.61, 0, 1)],
)
def test_an_image_moves_and_the_gap_is_the_mean_colour(down: float, right: float, rows: int, columns: int) -> None:
    out = seen({"pixel_values": PIXELS}, view(down, right, False))["pixel_values"]
    expected = np.zeros((8 + 4, 16 + 8), dtype=np.float32)
    for channel in range(3):
        expected[:] = 0
        expected[2 + rows : 10 + rows, 4 + columns : 20 + columns] = PIXELS[0, channel]
        np.testing.assert_array_equal(out[0, channel], expected[2:10, 4:20])
    assert out.dtype == np.float32


def test_an_image_is_mirrored_from_left_to_right() -> None:
    out = seen({"pixel_values": PIXELS}, view(0.5, 0.5, True))["pixel_values"]
    np.testing.assert_array_equal(out, PIXELS[:, :, :, ::-1])


def test_each_image_of_a_batch_has_a_view_of_its_own() -> None:
    views = Views(np.array([0.0, 0.5]), np.array([0.5, 0.5]), np.array([False, True]))
    out = seen({"pixel_values": np.concatenate([PIXELS, PIXELS])}, views)["pixel_values"]
    np.testing.assert_array_equal(out[0, :, :7], PIXELS[0, :, 1:])
    np.testing.assert_array_equal(out[1], PIXELS[0, :, :, ::-1])


def test_what_is_drawn_is_spread_evenly() -> None:
    views = draw_views(40, 50, True, generator(0, "augment", 1, "a", 0))
    assert (len(views), views[0].down.shape) == (40, (50,))
    down = np.concatenate([own.down for own in views])
    mirrored = np.concatenate([own.mirrored for own in views])
    counts = np.bincount((down * 9).astype(int), minlength=9)
    assert counts.min() > 2000 / 9 - 60, "each of nine places about equally often"
    assert abs(mirrored.mean() - 0.5) < 0.05


def test_without_mirroring_images_are_moved_as_they_are_with_it() -> None:
    with_it, without = (draw_views(3, 4, mirror, generator(0, "augment", 1, "a", 0)) for mirror in (True, False))
    assert not any(own.mirrored.any() for own in without)
    for one, other in zip(with_it, without, strict=True):
        np.testing.assert_array_equal(one.down, other.down)
        np.testing.assert_array_equal(one.right, other.right)
