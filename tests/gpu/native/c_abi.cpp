// The kernels behind a C ABI, for callers that have no particular torch: with PD_USE_CUDA those for
// CUDA, else those for the CPU, under the same names. Nothing is checked here.
//
// A function returns null, or what is wrong in words. Strides and sizes are in bytes. What a kernel
// reads (planes, parts, blocks) lies where the kernel runs; shape, tiling and encoding on the host.
#include "../../../csrc/ops.h"

#ifdef PD_USE_CUDA
#include <cuda_runtime_api.h>
#endif

namespace {

static_assert(sizeof(pd::Plane) == 4 * 8, "callers write planes as 4 integers");
static_assert(sizeof(pd::PartPlane) == 3 * 8, "callers write parts as 3 integers");
static_assert(sizeof(pd::Tiling) == 8 * 8, "callers write a tiling as 8 integers");

const char* outcome() {
#ifdef PD_USE_CUDA
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#else
  return nullptr;
#endif
}

// shape: heads, tokens, bytes of a row.
pd::BlockRun block_run(
    const pd::Plane* planes, int64_t num_planes, const int64_t* shape, const int64_t* blocks,
    int64_t num_blocks) {
  return {planes, num_planes, {shape[0], shape[1], shape[2]}, blocks, num_blocks};
}

// element: 0 float32, 1 bfloat16, 2 float16, 3 fp8_e4m3.
pd::TokenRun token_run(
    const pd::PartPlane* parts, int64_t num_parts, int64_t heads, int64_t element,
    const pd::Tiling* tiling, const int64_t* blocks, int64_t num_blocks, int64_t tokens) {
  return {parts,   num_parts, heads,      static_cast<pd::Element>(element),
          *tiling, blocks,    num_blocks, tokens};
}

// encoding: bits, by channel or not, group, sinks.
pd::Encoding encoding_of(const int64_t* encoding) {
  return {encoding[0], encoding[1] != 0, encoding[2], encoding[3]};
}

// place: element, channels of a head, which of them is the first of the part.
pd::HeadSlab head_slab(const int64_t* place, const float* scales) {
  return {static_cast<pd::Element>(place[0]), place[1], place[2], scales};
}

}  // namespace

extern "C" {

const char* pd_pack_blocks(
    const pd::Plane* planes, int64_t num_planes, const int64_t* shape, const int64_t* blocks,
    int64_t num_blocks, char* slab, [[maybe_unused]] void* stream) {
  const pd::BlockRun run = block_run(planes, num_planes, shape, blocks, num_blocks);
#ifdef PD_USE_CUDA
  pd::pack_blocks_cuda(run, slab, stream);
#else
  pd::pack_blocks_cpu(run, slab, 0, pd::packing_items(run));
#endif
  return outcome();
}

const char* pd_unpack_blocks(
    const pd::Plane* planes, int64_t num_planes, const int64_t* shape, const int64_t* blocks,
    int64_t num_blocks, const char* slab, [[maybe_unused]] void* stream) {
  const pd::BlockRun run = block_run(planes, num_planes, shape, blocks, num_blocks);
#ifdef PD_USE_CUDA
  pd::unpack_blocks_cuda(run, slab, stream);
#else
  pd::unpack_blocks_cpu(run, slab, 0, pd::packing_items(run));
#endif
  return outcome();
}

const char* pd_encode_blocks(
    const pd::PartPlane* parts, int64_t num_parts, int64_t heads, int64_t element,
    const pd::Tiling* tiling, const int64_t* blocks, int64_t num_blocks, int64_t tokens,
    const int64_t* encoding, char* slab, [[maybe_unused]] void* stream) {
  const pd::TokenRun run =
      token_run(parts, num_parts, heads, element, tiling, blocks, num_blocks, tokens);
#ifdef PD_USE_CUDA
  pd::encode_blocks_cuda(run, encoding_of(encoding), slab, stream);
#else
  pd::encode_blocks_cpu(run, encoding_of(encoding), slab, 0, pd::encoding_items(run));
#endif
  return outcome();
}

const char* pd_decode_blocks(
    const pd::PartPlane* parts, int64_t num_parts, int64_t heads, int64_t element,
    const pd::Tiling* tiling, const int64_t* blocks, int64_t num_blocks, int64_t tokens,
    const int64_t* encoding, const char* slab, [[maybe_unused]] void* stream) {
  const pd::TokenRun run =
      token_run(parts, num_parts, heads, element, tiling, blocks, num_blocks, tokens);
#ifdef PD_USE_CUDA
  pd::decode_blocks_cuda(run, encoding_of(encoding), slab, stream);
#else
  pd::decode_blocks_cpu(run, encoding_of(encoding), slab, 0, pd::encoding_items(run));
#endif
  return outcome();
}

// One part of some heads; tokens are counted from `skipped` behind the first of the first block.
// scales: one for each of `parts`, where the kernel runs, or null.
const char* pd_gather_heads(
    const pd::PartPlane* parts, int64_t num_parts, int64_t heads, int64_t element,
    const pd::Tiling* tiling, const int64_t* blocks, int64_t num_blocks, int64_t tokens,
    int64_t skipped, const int64_t* place, const float* scales, char* slab,
    [[maybe_unused]] void* stream) {
  pd::TokenRun run =
      token_run(parts, num_parts, heads, element, tiling, blocks, num_blocks, tokens);
  run.skipped = skipped;
#ifdef PD_USE_CUDA
  pd::gather_heads_cuda(run, head_slab(place, scales), slab, stream);
#else
  pd::gather_heads_cpu(run, head_slab(place, scales), slab, 0, pd::encoding_items(run));
#endif
  return outcome();
}

const char* pd_scatter_heads(
    const pd::PartPlane* parts, int64_t num_parts, int64_t heads, int64_t element,
    const pd::Tiling* tiling, const int64_t* blocks, int64_t num_blocks, int64_t tokens,
    int64_t skipped, const int64_t* place, const float* scales, const char* slab,
    [[maybe_unused]] void* stream) {
  pd::TokenRun run =
      token_run(parts, num_parts, heads, element, tiling, blocks, num_blocks, tokens);
  run.skipped = skipped;
#ifdef PD_USE_CUDA
  pd::scatter_heads_cuda(run, head_slab(place, scales), slab, stream);
#else
  pd::scatter_heads_cpu(run, head_slab(place, scales), slab, 0, pd::encoding_items(run));
#endif
  return outcome();
}

// `sum` must be zero before.
const char* pd_digest_blocks(
    const pd::Plane* planes, int64_t num_planes, const int64_t* shape, const int64_t* blocks,
    int64_t num_blocks, uint64_t* sum, [[maybe_unused]] void* stream) {
  const pd::BlockRun run = block_run(planes, num_planes, shape, blocks, num_blocks);
#ifdef PD_USE_CUDA
  pd::digest_blocks_cuda(run, sum, stream);
#else
  *sum = pd::digest_blocks_cpu(run);
#endif
  return outcome();
}

}  // extern "C"
