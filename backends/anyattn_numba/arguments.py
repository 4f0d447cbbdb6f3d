"""The argument block of a kernel: one row of words, which Python fills and compiled code reads.

A word is an int64, an address, or the bits of a float64. Names are byte offsets. What is the same for every
call of one signature stands in a template; a call copies it and puts in its addresses.
"""

from __future__ import annotations

BLOCK_WORDS = 79
(
    # What each call sets: the counter that hands out items, memory for the threads, and arrays. lse is
    # (B, Hq, Lq), contiguous, of the accumulation type; 0 where it is not wanted.
    COUNTER,
    SCRATCH,
    Q,
    K,
    V,
    OUT,
    LSE,
    # Work: the items, and how much memory a thread has.
    NUM_ITEMS,
    ITEMS,
    SCRATCH_SIZE,
    # Lengths.
    NUM_HEADS,
    GROUP_SIZE,
    Q_LEN,
    K_LEN,
    HEAD_DIM,
    V_HEAD_DIM,
    CHUNK,
    # Arrays: offsets of the batch entries (address of int64), strides in bytes.
    Q_BATCH,
    Q_HEAD,
    Q_ROW,
    Q_STEP,
    K_BATCH,
    K_HEAD,
    K_ROW,
    K_STEP,
    V_BATCH,
    V_HEAD,
    V_ROW,
    V_STEP,
    OUT_BATCH,
    OUT_HEAD,
    OUT_ROW,
    OUT_STEP,
    # Where the keys of rows are split between items: results (parts, rows, v_head_dim) and lse (parts, rows)
    # of the parts, contiguous, of the accumulation type.
    NUM_PARTS,
    NUM_ROWS,
    PARTS,
    PART_LSE,
    # (Hq,), contiguous, of the accumulation type; 0 for none.
    SINKS,
    # A float64.
    SCALE,
    # Positions of row 0, int64 for each batch entry.
    OFFSETS,
    # Rows asked for, int64, or 0 for all.
    ROWS,
    # The schedule (`anyattn.schedule.Spans`); line -1 of an item sees every key.
    SPAN_STARTS,
    SPAN_ENDS,
    SPAN_KINDS,
    COLUMNS,
    # Code for scores and masks (`anyattn_numba.tiles`), 0 for none, and what it captures.
    TILE_CODE,
    HAS_SCORE,
    HAS_KEEP,
    CAPTURED,
    # Where the parts of a thread's memory begin, in bytes.
    AT_LANES,
    AT_STATE,
    AT_QUERY,
    AT_SUM,
    AT_SCORE,
    AT_STAGE,
    AT_KEYS,
    AT_VALUES,
    AT_SEEN,
    AT_TILE,
    # Converted rows of all keys and values of a head, and a byte for each WIDENED of them that says whether
    # they are there; 0 where a thread keeps none.
    AT_WIDE_KEYS,
    AT_WIDE_VALUES,
    AT_WIDENED,
    # Weights and statistics: where a thread's memory has a row of lanes for each of log(total), entropy and
    # largest weight, and where a chunk of weights by rows, or the sums of its keys.
    AT_SUMMARY,
    AT_WEIGHTS,
    # Statistics: arrays of the accumulation type, 0 where not wanted, and the runs, which are what the
    # counter hands out.
    KEY_MASS,
    ENTROPY,
    PEAK,
    NUM_RUNS,
    RUNS,
    # float32 factors (..., Hkv, Lk, 1) of int8 rows: an address, which each call sets, and strides.
    K_SCALES,
    K_SCALES_BATCH,
    K_SCALES_HEAD,
    K_SCALES_ROW,
    K_SCALES_STEP,
    V_SCALES,
    V_SCALES_BATCH,
    V_SCALES_HEAD,
    V_SCALES_ROW,
    V_SCALES_STEP,
) = range(0, 8 * BLOCK_WORDS, 8)

# An item: some queries that share a key/value head. Lane n is number first + n of the head's group_size x
# q_len queries, row by row, head by head.
ITEM_WORDS = 8
ITEM_BATCH, ITEM_HEAD, ITEM_FIRST, ITEM_COUNT, ITEM_LINE, ITEM_KEY, ITEM_KEY_END, ITEM_PART = range(0, 64, 8)

# Keys that are converted together.
WIDENED = 16

# A run: the items first to end - 1, whose weights are added to one row of key_mass.
RUN_WORDS = 3
RUN_FIRST, RUN_END, RUN_ROW = range(0, 24, 8)

# What tile code is given: the scores, how many keys, the first key or the addresses of int32 keys, the batch
# index, the lanes, memory for what is the same in a row, and what to do.
TILE_WORDS = 12
(
    TILE_SCORES,
    TILE_KEYS,
    TILE_FIRST,
    TILE_COLUMNS,
    TILE_BATCH,
    TILE_LANES,
    TILE_WIDTH,
    TILE_ROW_VALUES,
    TILE_CAPTURED,
    TILE_ACTION,
    TILE_SEEN,
) = range(0, 88, 8)

# What stands among the captured values of an array along (b, h, row, j): the code that reads its entries in
# a tile (`anyattn_numba.pairs`), how many rows and keys an entry serves, bytes of each query that come before
# them in the memory for row values, the array's number; then its address, shape and strides.
SOURCE_WORDS = 13
SOURCE_CODE, SOURCE_BLOCK, SOURCE_ROOM, SOURCE_SLOT, SOURCE, SOURCE_SHAPE = range(0, 48, 8)
SOURCE_STRIDES = 72

# Actions of tile code: change the scores; that and hide; tell what is seen (1 or 0) in TILE_SEEN; multiply
# what softmax made of the scores by what dropout leaves of it.
SCORE, SCORE_AND_HIDE, SEEN, KEEP = range(4)
