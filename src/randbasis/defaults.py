"""What functions of the library, and the command alike, take where nothing is said: stated once, without torch.

What has settings of its own keeps its defaults there: :mod:`randbasis.train.settings`, :mod:`randbasis.use.settings`.
"""

PACKED_BITS = 16
"""Bits of a coefficient of a packed file."""
QUANTIZED_BITS = 4
"""Bits of a coefficient that is quantized."""
ONE_SCALE = 0
"""Coefficients that share a scale: 0 is one scale a vector."""
MERGED_DTYPE = "auto"
"""Dtype of a merged model: as its base is stored."""
REFINE_STEPS = 100
"""Steps of training of an adapter that was projected onto a basis."""
AVERAGED_HEADS = "average"
"""What becomes of the heads of adapters that are added."""
STORE_TIMEOUT = 30.0
"""Seconds to wait for another writer of a store."""
PAGE = 100
"""Most records that a list of a store gives at once."""
