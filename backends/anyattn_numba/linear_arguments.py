"""What the kernel of linear attention is called with: the words of the argument block, and of each strand."""

from __future__ import annotations

BLOCK_WORDS = 48
(
    COUNTER,
    NUM_STRANDS,
    STRANDS,
    SCRATCH,
    SCRATCH_SIZE,
    GROUP_SIZE,
    HEAD_DIM,
    V_HEAD_DIM,
    # V_HEAD_DIM, and one more with the normalizer.
    COLUMNS,
    CAUSAL,
    SCALE,
    # Tokens of a chunk, at most.
    TOKENS,
    # Decays of a token: none, one, or one for each channel of a key.
    CHANNELS,
    DELTA,
    # Whether whole rows may be read, or written, where they lie.
    Q_IN_PLACE,
    K_IN_PLACE,
    V_IN_PLACE,
    OUT_IN_PLACE,
    Q_HEAD,
    Q_ROW,
    Q_STEP,
    K_ROW,
    K_STEP,
    V_ROW,
    V_STEP,
    OUT_HEAD,
    OUT_ROW,
    DECAY_ROW,
    DECAY_STEP,
    BETA_ROW,
    # Where the parts of a thread's memory begin, in bytes.
    AT_KEYS,
    AT_TURNED,
    AT_VALUES,
    AT_STATE,
    AT_QUERY,
    AT_OUT,
    AT_SCORE,
    AT_KEPT,
    AT_SINCE,
    AT_BETA,
    AT_FACTORS,
    AT_LEFT,
    AT_STATE_KEPT,
    AT_ONES,
    AT_COMING,
) = range(0, 8 * 45, 8)
# Addresses at AT_COMING.
COMING = 16
STRAND_WORDS = 10
(
    STRAND_Q,
    STRAND_K,
    STRAND_V,
    STRAND_OUT,
    STRAND_DECAY,
    STRAND_BETA,
    STATE_BEFORE,
    STATE_AFTER,
    Q_LEN,
    K_LEN,
) = range(0, 8 * STRAND_WORDS, 8)
