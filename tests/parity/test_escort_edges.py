"""Edge maps, sizes and swaps: the numbers of ESCORT's card."""

import pytest
import torch

from synth.escort.batches import swap
from synth.escort.edges import EdgeMap, canny, drawing_size, pack, resize_edges, short_side, unpack
from utils.training import seeding


def random_edges(height, width, *key):
    return torch.rand(height, width, generator=seeding.generator("edges", *key)) < 0.5


@pytest.mark.parametrize(
    ("size", "high", "low"),
    [
        ((512, 384), (704, 512), (320, 256)),
        ((300, 400), (512, 704), (256, 320)),
        ((288, 400), (512, 704), (256, 384)),
        ((500, 2000), (256, 1024), (256, 1024)),  # halved, since it would be too large
        ((32, 32), (512, 512), (256, 256)),
        ((600, 800), (512, 704), (512, 704)),  # its short side has 512 already
        ((1536, 512), (1536, 512), (1536, 512)),  # exactly as many pixels as are allowed
    ],
)
def test_images_are_drawn_at_the_published_sizes(size, high, low):
    drawn = {way: drawing_size(*size, short_side(*size, way)) for way in ("high", "low")}
    assert drawn == {"high": high, "low": low}


def test_canny_finds_the_published_square():
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    image[:, 16:48, 16:48] = torch.tensor([200, 50, 50], dtype=torch.uint8).view(3, 1, 1)
    rows, columns = canny(image).nonzero(as_tuple=True)
    assert len(rows) == 124
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (15, 47, 15, 47)


@pytest.mark.parametrize(("step", "edges"), [(50, 0), (51, 64)])
def test_canny_sees_a_step_from_its_threshold_on(step, edges):
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    image[:, :, 32:] = step
    assert canny(image).sum() == edges


def test_a_grey_image_has_the_edges_of_three_equal_channels():
    image = torch.randint(0, 256, (1, 20, 30), generator=seeding.generator("grey")).to(torch.uint8)
    assert torch.equal(canny(image), canny(image.expand(3, -1, -1).contiguous()))


def test_maps_grow_by_opencvs_nearest_pixel():
    row = torch.tensor([[0, 1, 0, 1, 0]], dtype=torch.bool)
    taken = torch.tensor([0, 0, 1, 1, 2, 3, 3, 4])  # Pillow would take 0 0 1 2 2 3 4 4
    assert torch.equal(resize_edges(row, 1, 8)[0], row[0, taken])


@pytest.mark.parametrize(("height", "width", "packed"), [(32, 32, 128), (256, 256, 8192), (384, 512, 24576)])
def test_a_native_map_costs_a_twenty_fourth_of_a_coloured_image(height, width, packed):
    assert len(EdgeMap.of(random_edges(height, width), (32, 32)).bits) == packed == height * width * 3 / 24


def test_a_packed_map_is_the_map():
    edges = random_edges(7, 5)
    packed = EdgeMap.of(edges, (14, 10))
    assert torch.equal(packed.edges(), edges) and len(packed.bits) == 5 and packed.size == (14, 10)


def random_maps(label, *sizes):
    return [EdgeMap.of(random_edges(*size, label, place), size) for place, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("maps", "beside"),
    [
        ({label: random_maps(label, *[(16, 16)] * 3) for label in (4, 1)}, 2 * 8 + 8),  # two classes, one size
        ({0: random_maps(0, (3, 5), (8, 8), (9, 2)), 2: []}, 2 * 8 + 3 * 8),  # many sizes
    ],
)
def test_stored_maps_come_back_with_hardly_a_byte_beside_them(maps, beside):
    stored, nbytes = pack(maps), sum(len(one.bits) for own in maps.values() for one in own)
    assert unpack(stored) == maps and stored["bits"].numel() == nbytes
    assert sum(tensor.nbytes for tensor in stored.values()) == nbytes + beside


def test_equal_maps_have_one_name_and_others_do_not():
    edges = random_edges(16, 16)
    assert EdgeMap.of(edges, (8, 8)).item == EdgeMap.of(edges.clone(), (8, 8)).item
    assert EdgeMap.of(edges, (8, 8)).item != EdgeMap.of(edges, (16, 16)).item != EdgeMap.of(~edges, (8, 8)).item


# With the probability of the card, and of a compressed exemplar, which is always a copy.
@pytest.mark.parametrize(("chance", "tolerance", "of_each"), [(0.4, 0.005, 0.003), (1.0, 0, 0.004)])
def test_copies_are_shown_as_often_as_published(chance, tolerance, of_each):
    shown, numbers = swap(torch.full((100_000,), chance), 5, seeding.generator("swap"))
    assert abs(shown.float().mean() - chance) <= tolerance
    assert all(abs((shown & (numbers == copy)).float().mean() - chance / 5) <= of_each for copy in range(5))
