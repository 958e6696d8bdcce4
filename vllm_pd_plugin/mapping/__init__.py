"""One engine's KV as another engine's: which of our ranks takes what, from where, and how. Pure.

    kv_cache    what KV means (``KvCacheSpec``), how it lies (``KvCacheLayout``)
    checks      a description that cannot be true is refused
    match       once for each peer: ``match(theirs, ours)`` -> the ``Share``s of each of our ranks
    route       how one of our ranks reads from them
    direct      which bytes of two pages lie alike
    reads       for each read: ``plan_reads(share, tokens, ...)`` -> descriptors

*Theirs* is always the producer's, the source; *ours* the consumer's.
"""
