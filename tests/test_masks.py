"""The mask vocabulary: pictures written by hand, words, algebra, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

import anyattn as aa
from anyattn import masks


def picture(mask, q_len=6, k_len=6, heads=1, batch=(), **options):
    """What each row sees, as rows of # and . (heads and batch entries one after the other)."""
    q = np.zeros((*batch, heads, q_len, 1))
    k = np.zeros((*batch, heads, k_len, 1))
    seen = aa.attention_weights(q, k, mask=mask, **options) > 0
    rows = seen.reshape(-1, k_len)
    return " ".join("".join(".#"[int(cell)] for cell in row) for row in rows)


@pytest.mark.parametrize(
    ("mask", "seen"),
    [
        (masks.causal(), "#..... ##.... ###... ####.. #####. ######"),
        (~masks.causal(), ".##### ..#### ...### ....## .....# ......"),
        (masks.sliding_window(1), "#..... ##.... .##... ..##.. ...##. ....##"),
        (masks.sliding_window(1, 2), "###... ####.. .####. ..#### ...### ....##"),
        (masks.sliding_window(None, 0), "#..... ##.... ###... ####.. #####. ######"),
        (masks.sliding_window(0, None), "###### .##### ..#### ...### ....## .....#"),
        (masks.dilated(1, 2), "#.#... .#.#.. #.#.#. .#.#.# ..#.#. ...#.#"),
        (masks.strided(3), "#..#.. .#..#. ..#..# #..#.. .#..#. ..#..#"),
        (masks.fixed(3), "..#..# ..#..# ..#..# ..#..# ..#..# ..#..#"),
        (masks.fixed(3, 2), ".##.## .##.## .##.## .##.## .##.## .##.##"),
        (masks.global_tokens(1), "###### #..... #..... #..... #..... #....."),
        (masks.global_tokens([1, 4]), ".#..#. ###### .#..#. .#..#. ###### .#..#."),
        (masks.global_tokens(np.array([4, 1])), ".#..#. ###### .#..#. .#..#. ###### .#..#."),
        (masks.prefix(2), "##.... ##.... ##.... ##.... ##.... ##...."),
        (masks.padding(4), "####.. ####.. ####.. ####.. ####.. ####.."),
        (masks.documents([0, 0, 1, 1, 1, 0]), "##...# ##...# ..###. ..###. ..###. ##...#"),
        (masks.documents([7, 7, 8]), "##.... ##.... ..#... ...... ...... ......"),
        (
            masks.block_sparse(np.array([[True, False], [False, True]]), 4),
            "####.. ####.. ####.. ####.. ....## ....##",
        ),
        (masks.dense(np.eye(6, dtype=bool)), "#..... .#.... ..#... ...#.. ....#. .....#"),
        (masks.from_function(lambda b, h, i, j: i + j == 5), ".....# ....#. ...#.. ..#... .#.... #....."),
        (masks.causal() & masks.strided(2) | masks.prefix(1), "#..... ##.... #.#... ##.#.. #.#.#. ##.#.#"),
    ],
)
def test_pictures(mask, seen):
    assert picture(mask) == seen


def test_many_global_tokens_are_looked_up():
    tokens = [0, 2, 3, 5, 8, 13, 21, 34, 55, 89]
    few = masks.global_tokens(tokens[:4]) | masks.global_tokens(tokens[4:7]) | masks.global_tokens(tokens[7:])
    for offset in (-3, 0, 70):
        assert picture(masks.global_tokens(tokens), 9, 97, q_offset=offset) == picture(
            few, 9, 97, q_offset=offset
        )


def test_positions_or_rows():
    """With two queries at the end of four keys, row 0 stands at position 2."""
    assert picture(masks.causal(), 2, 4) == "###. ####"
    assert picture(masks.causal(positions=False), 2, 4) == "#... ##.."
    assert picture(masks.sliding_window(1, positions=False), 2, 4) == "#... ##.."
    assert picture(masks.strided(2), 2, 4, q_offset=1) == ".#.# #.#."
    assert picture(masks.global_tokens(1), 2, 4) == "#... #..."
    assert picture(masks.global_tokens(1, positions=False), 2, 4) == "#### #..."
    assert picture(masks.documents([0, 0, 1, 1]), 2, 4) == "..## ..##"
    assert picture(masks.documents([0, 0, 1, 1], positions=False), 2, 4) == "##.. ##.."


def test_per_batch_entry():
    assert picture(masks.padding([1, 3]), 1, 3, batch=(2,)) == "#.. ###"
    assert picture(masks.prefix(np.array([0, 2])), 1, 3, batch=(2,)) == "... ##."
    assert picture(masks.documents([[0, 0, 1], [0, 1, 1]]), 1, 3, batch=(2,)) == "..# .##"


def test_random_blocks_see_as_many_keys_in_every_row():
    seen = picture(masks.random_blocks(2, 4, seed=11), 17, 30).split()
    # 30 keys are seven blocks of four and one of two.
    assert {row.count("#") for row in seen} <= {8, 6}
    assert seen[0] == seen[2]  # positions 13, 15: one block of queries
    assert len(set(seen)) > 2


def test_random_blocks_do_not_depend_on_how_many_rows_are_asked():
    whole = picture(masks.random_blocks(1, 4, seed=5), 24, 24).split()
    assert picture(masks.random_blocks(1, 4, seed=5), 5, 24).split() == whole[-5:]


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (masks.causal() & masks.sliding_window(512), "causal() & sliding_window(512)"),
        ((masks.causal() | masks.prefix(3)) & ~masks.fixed(4), "(causal() | prefix(3)) & ~fixed(4)"),
        (~(masks.strided(2) & masks.causal()), "~(strided(2) & causal())"),
        (masks.sliding_window(None, 4, positions=False), "sliding_window(None, 4, positions=False)"),
        (masks.dilated(2, 3) | masks.random_blocks(1, 2, 3), "dilated(2, 3) | random_blocks(1, 2, 3)"),
    ],
)
def test_words(mask, words):
    assert repr(mask) == words


def test_arrays_and_functions_join_masks():
    array = np.tri(6, dtype=bool)
    seen = picture(masks.sliding_window(1, 1) & array)
    assert seen == picture(masks.sliding_window(1))
    assert picture(array & masks.sliding_window(1, 1)) == seen
    assert picture((lambda b, h, i, j: j <= i) & masks.sliding_window(1, 1)) == seen


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: masks.sliding_window(-1), ValueError, "left is -1; wanted 0 or more"),
        (lambda: masks.sliding_window(1.5), TypeError, "left: wanted an integer"),
        (lambda: masks.dilated(2, 0), ValueError, "dilation: wanted 1 or more"),
        (lambda: masks.strided(0), ValueError, "stride: wanted 1 or more"),
        (lambda: masks.fixed(True), TypeError, "stride: wanted an integer"),
        (lambda: picture(masks.global_tokens([-1])), ValueError, "tokens: wanted 0 or more"),
        (lambda: masks.global_tokens("ab"), TypeError, "tokens: wanted a bool, integer or real float array"),
        (lambda: masks.global_tokens([1.5]), TypeError, "tokens: wanted an integer or integers"),
        (lambda: masks.prefix([-1, 2]), ValueError, "n: wanted 0 or more, got -1"),
        (lambda: masks.fixed(2, 5), ValueError, "width: wanted at most the stride, 2, got 5"),
        (lambda: masks.random_blocks(1, 2, 2**64), ValueError, "seed: wanted 64 bits"),
        (lambda: masks.padding([1.0]), TypeError, "lengths: wanted an integer or integers"),
        (lambda: masks.documents([0.5, 1.0]), TypeError, "ids: wanted integers"),
        (lambda: masks.documents([[0], [1, 2]]), ValueError, "equally long rows"),
        (lambda: masks.dense(np.zeros((2, 2))), TypeError, "array: wanted dtype bool"),
        (lambda: masks.block_sparse([[True]], 4), TypeError, "blocks: wanted a boolean array"),
        (lambda: masks.random_blocks(1, 4, -1), ValueError, "seed: wanted 0 or more"),
        (lambda: masks.causal() & 3, TypeError, "wanted a mask"),
        (lambda: bool(masks.causal()), TypeError, "combine masks with & | ~"),
    ],
)
def test_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            masks.padding([1, 2, 3]),
            r"padding: lengths: wanted one entry for each of 2 batch entries, got shape \(3,\)",
        ),
        (masks.documents([[0, 1, 2]]), "documents: ids: wanted one entry for each of 2 batch entries"),
        (masks.block_sparse(np.ones((2, 2), dtype=bool), 4), r"broadcasts to \(2, 1, 1, 1\)"),
        (masks.dense(np.ones((3, 4), dtype=bool)), r"broadcasts to \(2, 1, 3, 3\)"),
    ],
)
def test_what_only_the_call_can_refuse(mask, message):
    x = np.zeros((2, 1, 3, 4))
    with pytest.raises(ValueError, match=message):
        aa.attention(x, x, x, mask=mask)


def test_tokens_beyond_the_call_cost_nothing():
    assert picture(masks.global_tokens([*range(0, 20, 2), 10**15]), 3, 5) == picture(
        masks.global_tokens([0, 2, 4]), 3, 5
    )


def test_no_tokens_see_nothing():
    assert picture(masks.global_tokens([]), 1, 3) == "..."


def test_tokens_changed_in_place_are_noticed():
    tokens = np.array([0])
    mask = masks.global_tokens(tokens)
    assert picture(mask, 1, 3) == "#.."
    tokens[0] = 1
    assert picture(mask, 1, 3) == ".#."


def test_tokens_of_another_library_are_refused():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x = np.zeros((1, 3, 4))
    with pytest.raises(TypeError, match="tokens: wanted an array of numpy like q, got one of torch"):
        aa.attention(x, x, x, mask=masks.global_tokens(torch.tensor([1])))


@pytest.mark.parametrize("offset", [-5, 0, 3, 40])
def test_random_blocks_of_an_unread_offset(offset):
    """A traced offset gives the blocks of the concrete one; far outside the keys nothing is seen."""
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    q, k = jax.numpy.zeros((1, 6, 2)), jax.numpy.zeros((1, 12, 2))
    mask = masks.random_blocks(2, 2, seed=3)
    traced = jax.jit(lambda offset: aa.attention_weights(q, k, mask=mask, q_offset=offset))(offset)
    wanted = aa.attention_weights(q, k, mask=mask, q_offset=offset)
    np.testing.assert_array_equal(traced, wanted if offset < 18 else np.zeros_like(wanted))
