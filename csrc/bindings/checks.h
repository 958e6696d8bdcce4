// Whether the arguments of an op fit, and what they are to the kernels, which trust them.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

#include "../ops.h"

namespace pd::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Planes {
  std::vector<Plane> planes;
  BlockShape shape;

  // Every pointer is the host's.
  BlockRun run(const Tensor& blocks) const {
    return {
        planes.data(), static_cast<int64_t>(planes.size()), shape,
        static_cast<const int64_t*>(blocks.data_ptr()), blocks.numel()};
  }
};

struct Parts {
  std::vector<PartPlane> parts;
  int64_t heads;
  Element element;
  Tiling tiling;

  TokenRun run(const Tensor& blocks, int64_t tokens) const {
    return {parts.data(),   static_cast<int64_t>(parts.size()),
            heads,          element,
            tiling,         static_cast<const int64_t*>(blocks.data_ptr()),
            blocks.numel(), tokens};
  }
};

// Planes are [num_blocks, heads, tokens, width], equal but for their number of blocks and strides.
inline Planes check_planes(const std::vector<Tensor>& planes) {
  STD_TORCH_CHECK(!planes.empty(), "no planes were given");
  const Tensor& first = planes[0];
  STD_TORCH_CHECK(first.dim() == 4, "a plane has 4 dimensions, not ", first.dim());
  const auto element = static_cast<int64_t>(first.element_size());
  Planes result{{}, {first.size(1), first.size(2), first.size(3) * element}};
  for (const Tensor& plane : planes) {
    const bool is_equal = plane.dim() == 4 && plane.scalar_type() == first.scalar_type() &&
                          plane.size(1) == first.size(1) && plane.size(2) == first.size(2) &&
                          plane.size(3) == first.size(3) &&
                          plane.get_device() == first.get_device();
    STD_TORCH_CHECK(is_equal, "planes differ in shape, dtype or device");
    STD_TORCH_CHECK(
        plane.size(3) == 1 || plane.stride(3) == 1, "elements of a row must touch each other");
    result.planes.push_back(
        {static_cast<char*>(plane.data_ptr()), plane.stride(0) * element, plane.stride(1) * element,
         plane.stride(2) * element});
  }
  return result;
}

inline Element element_of(const Tensor& plane) {
  switch (plane.scalar_type()) {
    case ScalarType::Float:
      return Element::kFloat32;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Half:
      return Element::kFloat16;
    case ScalarType::Float8_e4m3fn:
    case ScalarType::Byte:  // as vLLM may call what an fp8 cache has
      return Element::kFloat8;
    default:
      STD_TORCH_CHECK(
          false, "only float32, bfloat16 and float16 can be encoded, and fp8_e4m3 converted");
  }
}

// Parts are [num_blocks, heads, token tiles, tokens of a tile, channel tiles, channels of a tile],
// equal but for their number of blocks and the strides of blocks and heads.
inline Parts check_parts(const std::vector<Tensor>& parts) {
  STD_TORCH_CHECK(!parts.empty(), "no parts were given");
  const Tensor& first = parts[0];
  STD_TORCH_CHECK(first.dim() == 6, "a part has 6 dimensions, not ", first.dim());
  const auto size = static_cast<int64_t>(first.element_size());
  const Tiling tiling{
      first.size(2) * first.size(3),
      first.size(4) * first.size(5),
      first.size(3),
      first.size(5),
      first.stride(2) * size,
      first.stride(3) * size,
      first.stride(4) * size,
      first.stride(5) * size};
  Parts result{{}, first.size(1), element_of(first), tiling};
  for (const Tensor& part : parts) {
    bool is_equal = part.dim() == 6 && part.scalar_type() == first.scalar_type() &&
                    part.get_device() == first.get_device() && part.size(1) == first.size(1);
    for (int64_t i = 2; is_equal && i < 6; ++i) {
      is_equal = part.size(i) == first.size(i) && part.stride(i) == first.stride(i);
    }
    STD_TORCH_CHECK(is_equal, "parts differ in shape, strides, dtype or device");
    result.parts.push_back(
        {static_cast<char*>(part.data_ptr()), part.stride(0) * size, part.stride(1) * size});
  }
  return result;
}

inline void check_blocks(const Tensor& blocks, const Tensor& plane) {
  STD_TORCH_CHECK(
      blocks.dim() == 1 && blocks.scalar_type() == ScalarType::Long && blocks.is_contiguous(),
      "blocks must be one contiguous dimension of int64");
  STD_TORCH_CHECK(
      blocks.get_device() == plane.get_device(), "blocks must be on the device of the planes");
}

// Not on a device: that would wait for it.
inline void check_bounds(const Tensor& blocks, const std::vector<Tensor>& planes) {
  const auto* const numbers = static_cast<const int64_t*>(blocks.data_ptr());
  for (const Tensor& plane : planes) {
    for (int64_t i = 0; i < blocks.numel(); ++i) {
      STD_TORCH_CHECK(
          numbers[i] >= 0 && numbers[i] < plane.size(0), "block ", numbers[i],
          " lies outside a plane of ", plane.size(0), " blocks");
    }
  }
}

// The tokens that count are in the blocks, and reach into the last of them.
inline void check_tokens(int64_t tokens, const Tensor& blocks, int64_t block_tokens) {
  const int64_t room = blocks.numel() * block_tokens;
  STD_TORCH_CHECK(
      tokens <= room && tokens > room - block_tokens, tokens, " tokens are not those of ",
      blocks.numel(), " blocks of ", block_tokens);
}

inline void check_slab(const Tensor& slab, const Tensor& plane, int64_t bytes) {
  STD_TORCH_CHECK(
      slab.dim() == 1 && slab.scalar_type() == ScalarType::Byte && slab.is_contiguous() &&
          slab.get_device() == plane.get_device(),
      "a slab is one contiguous dimension of uint8, on the device of the planes");
  STD_TORCH_CHECK(
      slab.numel() == bytes, "the slab has ", slab.numel(), " bytes, ", bytes, " are needed");
}

inline int64_t packed_bytes(const BlockRun& run) {
  return run.num_planes * run.num_blocks * run.block_bytes();
}

// Checks all that an encoding needs.
inline void check_encoding(
    const TokenRun& run, const Encoding& encoding, const Tensor& slab, const Tensor& part) {
  const int64_t width = run.tiling.width, bits = encoding.bits, group = encoding.group;
  STD_TORCH_CHECK(
      run.element != Element::kFloat8, "only float32, bfloat16 and float16 can be encoded");
  STD_TORCH_CHECK(bits == 2 || bits == 4 || bits == 8, "bits must be 2, 4 or 8, not ", bits);
  STD_TORCH_CHECK(
      width <= kMaxWidth, "rows of ", width, " channels are too wide; ", kMaxWidth, " are allowed");
  STD_TORCH_CHECK(
      width % (8 / bits) == 0, width, " channels of ", bits, " bits do not fill whole bytes");
  STD_TORCH_CHECK(
      encoding.by_channel || (group > 0 && (bits == 8 || width % group == 0)), "groups of ", group,
      " channels do not divide ", width);
  STD_TORCH_CHECK(encoding.sinks >= 0, "sinks must not be negative");
  STD_TORCH_CHECK(
      reinterpret_cast<uintptr_t>(slab.data_ptr()) % kAlignment == 0,
      "a slab begins at a multiple of ", kAlignment, " bytes");
  const Stripe stripe{run.tokens, width, encoding};
  check_slab(slab, part, run.num_parts * run.heads * stripe.bytes());
}

}  // namespace pd::bindings
