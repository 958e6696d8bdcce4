// The kernels, on raw pointers: nothing here knows of tensors.
#pragma once

#include <cstdint>

#include "planes.h"

namespace pd {

// Returns the hash of some blocks in every plane: planes first, then blocks in the order given.
uint64_t digest_blocks_cpu(
    const Plane* planes, int64_t num_planes, const BlockShape& shape, const int64_t* blocks,
    int64_t num_blocks);

// The same on a device; every pointer is the device's. ``sum`` must be zero before.
void digest_blocks_cuda(
    const Plane* planes, int64_t num_planes, const BlockShape& shape, const int64_t* blocks,
    int64_t num_blocks, uint64_t* sum, void* stream);

}  // namespace pd
