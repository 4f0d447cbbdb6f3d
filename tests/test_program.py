"""Programs: the structure of expressions, which no captured value changes."""

from __future__ import annotations

import numpy as np
import pytest
from random_expressions import random_mask, random_score

import anyattn as aa
from anyattn import masks, scores
from anyattn.describe import Options, describe
from anyattn.expr import nodes
from anyattn.expr.program import canonical, lower
from anyattn.expr.statements import table_slots

X = np.zeros((2, 4, 64, 8), "f4")


def program(mask=None, score_mod=None, **options):
    call = describe("attention", X, X, X, Options(mask=mask, score_mod=score_mod, **options))
    return lower(call.visible, call.score)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (masks.sliding_window(512), masks.sliding_window(0)),
        (masks.sliding_window(7) | masks.prefix(7), masks.sliding_window(7) | masks.prefix(8)),
        (masks.fixed(8, 2), masks.fixed(8, 3)),
        (masks.padding([1, 2]), masks.padding([64, 0])),
        (masks.documents([0] * 64), masks.documents([0, 1] * 50)),
        (masks.causal() & masks.prefix(3), masks.prefix(4) & masks.causal()),
        (~~masks.causal(), masks.causal()),
        (masks.causal(), masks.from_function(lambda b, h, i, j: i >= j)),
        (~masks.causal(), masks.from_function(lambda b, h, i, j: j > i)),
    ],
)
def test_values_and_spelling_do_not_change_the_key(one, other):
    assert program(one).key == program(other).key


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (masks.strided(4), masks.strided(8)),
        (masks.causal(), ~masks.causal()),
        (masks.causal(), masks.causal(positions=False)),
        (masks.padding([1, 2]), masks.padding(2)),
        (masks.global_tokens([1, 2]), masks.global_tokens([1, 2, 3])),
        (masks.dense(np.ones((64, 64), bool)), masks.block_sparse(np.ones((8, 8), bool), 8)),
    ],
)
def test_other_structure_is_another_key(one, other):
    assert program(one).key != program(other).key


def test_dtypes_of_tables_are_structure():
    keys = {program(score_mod=scores.alibi(np.ones(4, dtype))).key for dtype in ("f2", "f4", "f8")}
    assert len(keys) == 3


def test_functions_are_keyed_by_code_and_structure():
    def make(slopes, c):
        return lambda s, b, h, i, j: s - slopes[h] * abs(i - j) + c

    one, other = make(np.ones(4), 2.0), make(np.zeros(4), 3.0)
    assert program(score_mod=one).key == program(score_mod=other).key
    assert program(score_mod=one).parameters == (2.0,)


def test_values_are_arguments_in_slot_order():
    found = program(masks.strided(4) & masks.sliding_window(5), scores.alibi(4), softcap=30.0)
    assert sorted(map(str, found.parameters)) == sorted(map(str, (0, 5, 0, 30.0, 1 / 30)))
    assert found.parameter_kinds.count("float") == 2
    assert [t.shape for t in found.tables] == [(4,)]
    assert "4:int" in found.text


def test_a_constant_may_be_a_divisor_and_a_number():
    three = nodes.as_expr(3)
    for found in (lower(None, (nodes.I // three + three) / 1), lower(nodes.I // three < three, None)):
        assert 3 in found.parameters
        assert "3:int" in found.text


def test_mask_and_score_share_what_they_have_in_common():
    found = program(masks.sliding_window(5), scores.alibi(4))
    assert found.text.count("sub int %") == 2  # i - j and j - i, each once


def test_canonical_keeps_the_meaning_of_float_comparisons():
    """not (s < 1) is true for NaN and 1 <= s is not."""
    expr = ~(nodes.SCORE < 1.0)
    assert canonical(expr) is expr
    assert repr(canonical(~(nodes.I < nodes.J))) == "(j <= i)"


def test_constant_conditions_vanish():
    assert canonical(masks.sliding_window(None, None).expr & masks.causal().expr) is canonical(
        masks.causal().expr
    )
    assert repr(canonical(masks.causal().expr & (nodes.TRUE & ~nodes.TRUE))) == "False"


def test_equal_parts_are_one_object():
    assert (nodes.I - nodes.J) is (nodes.I - nodes.J)
    assert aa.where(nodes.I < nodes.J, nodes.I, nodes.J) is aa.where(nodes.I < nodes.J, nodes.I, nodes.J)


def test_another_batch_size_compiles_nothing():
    def key(batch):
        x = np.zeros((*batch, 4, 64, 8), "f4")
        call = describe("attention", x, x, x, Options(kv_lengths=np.full(batch, 3), q_offset=0, causal=True))
        return lower(call.visible, call.score).key

    assert key((2,)) == key((7,))
    assert key((2, 3)) == key((5, 3))


def test_what_was_lowered_before_is_no_part_of_what_follows():
    """Nodes are told apart by their ids, which those of a form that is gone give to the next one's."""
    for seed in range(60):
        roots = random_mask(seed).expr(), random_score(seed).expr(), random_score(seed + 1000).expr()
        found = lower(*roots)
        # Equal nodes are one object, so these are the forms of the next call and outlive it.
        forms = [canonical(root) for root in roots]
        assert lower(*roots).text == found.text, seed
        assert len(table_slots(found)) == len(found.tables), seed
        del forms
