"""Linear attention: a state that each token decays, writes to and reads, instead of a softmax over all keys.

`recurrence` is the definition, `front` what users call; `describe` checks a call and makes a
`call.LinearCall` of it, which the same dispatch as for `attention` gives to a backend. `anyattn.feature_maps`
holds the feature maps.
"""

from __future__ import annotations
