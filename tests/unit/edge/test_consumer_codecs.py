"""What a request's KV came through, as its consumer notes it for the prefix cache."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

from vllm_pd_plugin.codecs.codec import Codec

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from tests.fakes.consumer import Consumer, new_source


def test_kv_of_a_narrower_codec_than_its_prefix_goes_by_a_hash_of_its_own() -> None:
    """Its prefix was found as int8's; who allows no more than that must not find int4's there."""
    consumer = Consumer()
    consumer.fetching("r", new_source())
    (consuming,) = consumer.requests._open.values()
    noted: list[Codec] = []
    provenance: Any = SimpleNamespace(arrived=lambda _request, _token, codec: noted.append(codec))
    consumer.requests._provenance = provenance
    consuming.lossy = Codec.INT8
    for codec in (Codec.RAW, Codec.INT8, Codec.INT4, Codec.INT4, Codec.INT8):
        consumer.requests._note_codec(consuming, codec)
    assert noted == [Codec.INT4]
