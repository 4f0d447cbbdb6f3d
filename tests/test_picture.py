"""Pictures of masks: cells and numbers against dense evaluation, warnings, and what a browser gets."""

from __future__ import annotations

import time
import xml.etree.ElementTree as ET

import numpy as np
import pytest

import anyattn as aa
from anyattn import masks

SVG = "{http://www.w3.org/2000/svg}"


def seen(mask, q_len, k_len, **options):
    """(q_len, k_len) of one entry, from the weights of equal scores."""
    lead = options.pop("lead", (1,))
    q, k = np.zeros((*lead, q_len, 1)), np.zeros((*lead, k_len, 1))
    return aa.attention_weights(q, k, mask=mask, backend="reference", **options) > 0


def shares(dense, cell):
    down, across = -(-dense.shape[0] // cell), -(-dense.shape[1] // cell)
    found = [
        [dense[r * cell : (r + 1) * cell, c * cell : (c + 1) * cell].mean() for c in range(across)]
        for r in range(down)
    ]
    return np.array(found)


IDS = np.sort(np.random.default_rng(0).integers(0, 9, 300))


@pytest.mark.parametrize(
    "mask",
    [
        masks.causal(),
        masks.causal() & masks.sliding_window(30) | masks.global_tokens(5),
        masks.strided(7) & ~masks.fixed(16, 3),
        masks.dilated(9, 4),
        masks.documents(IDS),
        masks.random_blocks(3, 16, 0),
        masks.dense(np.random.default_rng(1).random((300, 431)) < 0.3),
        masks.from_function(lambda b, h, i, j: (i * j) % 7 < 3),
    ],
    ids=repr,
)
def test_cells_and_density_are_those_of_the_mask(mask):
    found = mask.picture(300, 431)
    dense = seen(mask, 300, 431)[0]
    assert found.exact
    assert found.cell == 4
    np.testing.assert_allclose(found.cells, shares(dense, 4), atol=1e-12)
    assert found.density == pytest.approx(dense.mean(), abs=1e-12)
    tiles = [dense[r : r + 128, c : c + 128].any() for r in range(0, 300, 128) for c in range(0, 431, 128)]
    assert found.tiles_kept == pytest.approx(np.mean(tiles))
    np.testing.assert_array_equal(found.blind_rows, ~dense.any(1))


def test_small_lengths_show_every_pair():
    found = masks.causal().picture(5, 9)
    np.testing.assert_array_equal(found.cells, seen(masks.causal(), 5, 9)[0])
    assert found.offset == 4


def test_estimates_are_close():
    """16k partial cells of 32 x 32: each is estimated from 256 of its pairs."""
    found = masks.fixed(8, 3).picture(4096)
    assert not found.exact
    assert found.density == pytest.approx(3 / 8, abs=1e-3)
    mixed = masks.from_function(lambda b, h, i, j: (i * i + j * j * j) % 11 < 4).picture(4096)
    rows = np.arange(4096)[:, None]
    dense = (rows**2 + np.arange(4096) ** 3) % 11 < 4
    assert mixed.density == pytest.approx(dense.mean(), abs=2e-3)
    assert np.abs(mixed.cells - shares(dense, 32)).max() < 0.25
    thin = masks.causal() & masks.sliding_window(1)
    assert np.all(np.diag(thin.picture(1 << 20).cells) > 0)
    band = masks.global_tokens(64).picture(40000)
    assert band.density == pytest.approx((2 * 64 * 40000 - 64**2) / 40000**2, rel=0.03)


@pytest.mark.parametrize(
    "mask",
    [
        masks.causal(),
        masks.causal() & masks.sliding_window(512) | masks.global_tokens(64),
        masks.strided(128) & masks.causal(),
    ],
    ids=repr,
)
def test_long_masks_draw_at_once_and_stay_small(mask):
    began = time.process_time()
    svg = mask.picture(100_000).svg()
    assert time.process_time() - began < 10  # 0.2 to 1.5 s on an idle machine
    assert len(svg) < 30_000


def test_entries_are_shown_one_at_a_time():
    mask = masks.padding([3, 9]) & masks.dense(
        np.eye(10, dtype=bool)[None, None] | np.zeros((1, 2, 1, 1), bool)
    )
    for b, n in ((0, 3), (1, 9)):
        found = mask.picture(10, b=b, h=1)
        assert found.entry == (b, 1)
        assert found.density == pytest.approx(n / 100)
        assert f"batch entry {b}, head 1" in found.svg()
    assert masks.causal().picture(10).entry is None
    with pytest.raises(ValueError, match="picture: b: wanted 0 to 1, got 2"):
        mask.picture(10, b=2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"q_len": -1}, ValueError, "picture: q_len: wanted 0 or more, got -1"),
        ({"q_len": 8.5}, TypeError, "picture: q_len: wanted an integer, got float 8.5"),
        ({"q_len": 8, "k_len": -2}, ValueError, "picture: k_len: wanted 0 or more, got -2"),
        ({"k_len": True}, TypeError, "picture: k_len: wanted an integer, got bool"),
        ({"q_offset": 0.0}, TypeError, "picture: q_offset: wanted an integer, got float"),
        ({"tile": (0, 1)}, ValueError, "picture: tile: wanted 1 or more, got 0"),
        ({"tile": (1, 1.5)}, TypeError, "picture: tile: wanted an integer, got float 1.5"),
        ({"tile": 128}, ValueError, r"picture: tile: wanted \(rows, keys\), got 128"),
        ({"h": 1}, ValueError, "picture: h: wanted 0 to 0, got 1"),
        ({"b": 0.0}, TypeError, "picture: b: wanted an integer, got float"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        masks.causal().picture(**arguments)


def test_lengths_of_numpy_are_integers():
    found = masks.causal().picture(np.int64(8), tile=(np.int32(2), 4))
    assert (found.q_len, found.k_len, found.tile) == (8, 8, (2, 4))
    assert type(found.q_len) is int


class TestWarnings:
    def test_rows_that_see_nothing(self):
        found = (masks.sliding_window(8) & masks.prefix(5)).picture(24)
        assert found.warnings == ("11 rows see no key, and the result there is 0: 13 to 23",)
        assert found.blind_rows.tolist() == [False] * 13 + [True] * 11
        one = masks.causal().picture(4, q_offset=-1)
        assert one.warnings == ("1 row sees no key, and the result there is 0: 0",)

    def test_rows_of_one_entry(self):
        found = masks.padding([4, 0]).picture(4)
        assert found.warnings == ("4 rows see no key, and the result there is 0: 0 to 3 (batch entry 1)",)
        assert not found.blind_rows.any()

    def test_scattered_rows_are_summed_up(self):
        found = masks.from_function(lambda b, h, i, j: i % 2 == 0).picture(12)
        assert found.warnings == ("6 rows see no key, and the result there is 0: 1, 3, 5, 7, ...",)

    @pytest.mark.parametrize(
        ("mask", "warning"),
        [
            (
                masks.causal() | masks.global_tokens([300]),
                "called causal, but position 0 (row 0) sees key 300",
            ),
            (masks.causal(positions=False), None),
            (masks.causal(), None),
            (masks.causal() & masks.strided(3), None),
            (~masks.causal() | masks.strided(1), None),
            (masks.sliding_window(3, 3), None),
        ],
        ids=repr,
    )
    def test_causal_masks_that_leak(self, mask, warning):
        found = mask.picture(400).warnings
        assert found == (() if warning is None else (warning,))

    def test_functions_called_causal(self):
        def causal_with_a_slip(b, h, i, j):
            return j <= i + 1

        def non_causal(b, h, i, j):
            return j <= i + 1

        (warning,) = masks.from_function(causal_with_a_slip).picture(400, 500).warnings
        assert warning == "called causal, but position 100 (row 0) sees key 101"
        assert masks.from_function(non_causal).picture(400).warnings == ()


class TestDrawing:
    def test_is_xml_with_words(self):
        mask = masks.documents([0, 0, 1]) & masks.causal() | masks.from_function(lambda b, h, i, j: i < j * 0)
        root = ET.fromstring(mask.picture().svg())
        assert root.tag == f"{SVG}svg"
        assert "documents(<ids (3,)>)" in root.get("aria-label")
        texts = [t.text for t in root.iter(f"{SVG}text")]
        assert {"key", "row", "all seen", "some", "none"} <= set(texts)
        assert any("of the 128 × 128 tiles kept" in t for t in texts)

    def test_strokes_are_the_cells(self):
        found = masks.causal().picture(6, q_offset=0)
        root = ET.fromstring(found.svg())
        group = next(g for g in root.iter(f"{SVG}g") if g.get("class") == "y")
        (path,) = group
        assert path.get("d") == "".join(f"M0 {n}.5h{n + 1}" for n in range(6))
        assert path.get("opacity") == "1"

    def test_shades_tell_shares_apart(self):
        blocks = np.zeros((256, 256), bool)
        blocks[:2, :2] = [[1, 0], [0, 0]]
        blocks[2:4, 2:4] = [[1, 1], [1, 0]]
        root = ET.fromstring(masks.dense(blocks).picture().svg())
        group = next(g for g in root.iter(f"{SVG}g") if g.get("class") == "y")
        found = {path.get("d"): float(path.get("opacity")) for path in group}
        assert set(found) == {"M0 0.5h1", "M1 1.5h1"}
        assert found["M0 0.5h1"] < found["M1 1.5h1"] < 1

    def test_empty_calls(self):
        for q_len, k_len in ((0, 5), (5, 0)):
            found = masks.causal().picture(q_len, k_len, q_offset=0)
            assert found.density == 0
            ET.fromstring(found.svg())

    def test_save(self, tmp_path):
        masks.causal().picture(8).save(tmp_path / "mask.svg")
        assert ET.parse(tmp_path / "mask.svg").getroot().tag == f"{SVG}svg"
        with pytest.raises(ValueError, match=r"path: wanted a name that ends in .svg, got 'mask.png'"):
            masks.causal().picture(8).save(tmp_path / "mask.png")

    def test_printed(self):
        found = masks.causal().picture(128)
        assert repr(found) == (
            "causal() of 128 rows and 128 keys: 50.4 % of the pairs seen, 100 % of the 128 × 128 tiles kept"
        )


class TestNotebooks:
    @pytest.mark.parametrize(
        ("mask", "q_len", "k_len"),
        [
            (masks.sliding_window(512), 2048, 2048),
            (masks.documents(IDS), 300, 300),
            (masks.dense(np.ones((7, 9), bool)), 7, 9),
            (masks.block_sparse(np.ones((3, 4), bool), 16), 48, 64),
        ],
        ids=repr,
    )
    def test_lengths_that_show_the_pattern(self, mask, q_len, k_len):
        found = mask.picture()
        assert (found.q_len, found.k_len) == (q_len, k_len)
        assert mask._repr_html_() == found.svg()

    def test_what_cannot_be_drawn_is_named(self):
        torch = pytest.importorskip("torch", reason="torch is not installed")
        mask = masks.documents(torch.zeros(5, dtype=torch.int64, device="meta"))
        with pytest.raises(ValueError, match="hangs on arrays that the host cannot read"):
            mask.picture(5)
        assert mask._repr_html_() == "<code>documents(&lt;ids (5,)&gt;)</code>"

    def test_arrays_of_torch(self):
        torch = pytest.importorskip("torch", reason="torch is not installed")
        found = masks.documents(torch.tensor(IDS)).picture()
        assert found.density == masks.documents(IDS).picture().density
