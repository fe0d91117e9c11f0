"""The self-check finds every kind of packing mistake."""

import numpy as np
import pytest

from adapters_store.image import build_image, plan_image
from adapters_store.reading import read_adapter
from adapters_store.self_check import check_image


@pytest.fixture
def packed(make_layout, make_adapter, tmp_path):
    layout = make_layout("bfloat16")
    directory = make_adapter(layout).write(tmp_path)
    modules = read_adapter(directory, layout, 64).modules
    return build_image(layout, modules, plan_image(layout, modules)), modules, layout


def test_a_sound_image_is_within_the_bound(packed):
    assert check_image(*packed).max_bound_ratio <= 1


def swap_two_rows(image):
    image.row_offset[[0, 1]] = image.row_offset[[1, 0]]
    image.row_scale[[0, 1]] = [3, 2]


def scale_one_row(image):
    image.row_scale[5] *= 1.05


def move_one_row(image):
    image.row_offset[2] += 8


def lose_one_row(image):
    image.row_ptr[1:] -= 1


def give_a_row_to_a_module_without_adapter(image):
    image.row_ptr[2] += 1


def zero_a_page(image):
    image.pages[0] = 0


def flip_one_number(image):
    image.pages[0, 3] ^= np.uint16(0x8000)


@pytest.mark.parametrize(
    "damage",
    [
        swap_two_rows,
        scale_one_row,
        move_one_row,
        lose_one_row,
        give_a_row_to_a_module_without_adapter,
        zero_a_page,
        flip_one_number,
    ],
)
def test_damage_is_far_outside_of_the_bound(packed, damage):
    damage(packed[0])
    assert check_image(*packed).max_bound_ratio > 2
