// The kernels, on raw pointers: nothing here knows of tensors.
#pragma once

#include <cstdint>

#include "heads.h"
#include "planes.h"
#include "slab.h"
#include "tiling.h"

namespace pd {

// Some blocks in every plane.
struct BlockRun {
  const Plane* planes;
  int64_t num_planes;
  BlockShape shape;
  const int64_t* blocks;
  int64_t num_blocks;

  PD_BOTH int64_t block_bytes() const { return shape.rows() * shape.row_bytes; }
};

// The parts of a run that may be worked on independently of each other, by any number of threads.
inline int64_t packing_items(const BlockRun& run) { return run.num_planes * run.num_blocks; }
inline int64_t encoding_items(const TokenRun& run) { return run.num_parts * run.heads; }

// Copy between blocks and a slab: items [first, last).
void pack_blocks_cpu(const BlockRun& run, char* slab, int64_t first, int64_t last);
void unpack_blocks_cpu(const BlockRun& run, const char* slab, int64_t first, int64_t last);
void pack_blocks_cuda(const BlockRun& run, char* slab, void* stream);
void unpack_blocks_cuda(const BlockRun& run, const char* slab, void* stream);

// Encode blocks into a slab, and decode a slab into blocks: items [first, last).
void encode_blocks_cpu(
    const TokenRun& run, const Encoding& encoding, char* slab, int64_t first, int64_t last);
void decode_blocks_cpu(
    const TokenRun& run, const Encoding& encoding, const char* slab, int64_t first, int64_t last);
void encode_blocks_cuda(const TokenRun& run, const Encoding& encoding, char* slab, void* stream);
void decode_blocks_cuda(
    const TokenRun& run, const Encoding& encoding, const char* slab, void* stream);

// Copy one part of some heads from blocks into a slab, or from a slab into blocks, and convert it
// to the type there: items [first, last), of which there are as many as for encoding.
void gather_heads_cpu(
    const TokenRun& run, const HeadSlab& place, char* slab, int64_t first, int64_t last);
void scatter_heads_cpu(
    const TokenRun& run, const HeadSlab& place, const char* slab, int64_t first, int64_t last);
void gather_heads_cuda(const TokenRun& run, const HeadSlab& place, char* slab, void* stream);
void scatter_heads_cuda(const TokenRun& run, const HeadSlab& place, const char* slab, void* stream);

// Returns the hash of some blocks in every plane: planes first, then blocks in the order given.
uint64_t digest_blocks_cpu(const BlockRun& run);

// The same on a device; every pointer is the device's. ``sum`` must be zero before.
void digest_blocks_cuda(const BlockRun& run, uint64_t* sum, void* stream);

}  // namespace pd
