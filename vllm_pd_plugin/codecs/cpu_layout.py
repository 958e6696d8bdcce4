"""Where vLLM's CPU attention kernels keep keys and values; pure.

vLLM says of a cache only that it is ``[num_blocks, heads, tokens, 2 * width]``. Its CPU backend
takes a head's part of a block as so many bytes, the keys and then the values, each as its kernel
wants them (``csrc/cpu/cpu_attn_*.hpp`` in vLLM 0.32).
``tests/unit/codecs/test_cpu_layout.py`` compares this with what the kernels do.
"""

from __future__ import annotations

from vllm_pd_plugin.codecs.codec import Part


def parts_of_cpu_kernel(kernel: str, tokens: int, width: int) -> tuple[Part, ...]:
    """Return what a head has in a block, as one of the kernels keeps it; nothing where that is not
    known.

    kernel: what vLLM calls its ISA (``_get_attn_isa``). tokens: of a block. width: of a head.
    """
    values = tokens * width
    if kernel in ("vec", "vec16"):
        return (
            Part.of_columns("key", width, 0, tokens),
            Part.of_rows("value", width, values, width),
        )
    if kernel == "amx":  # tiles of 16 rows of 64 bytes, as the matrix unit wants bfloat16
        return (
            Part("key", width, 0, 16, 2, (16 * width, 2, 32, 1)),
            Part("value", width, values, 2, 16, (32, 1, 16 * tokens, 2)),
        )
    return ()
