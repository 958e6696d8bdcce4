// Whether the arguments of gather_heads and scatter_heads fit, and what they are to the kernels.
#pragma once

#include <cmath>

#include "checks.h"

namespace pd::bindings {

// What is moved of every layer; the first token and the first head are as numbered in the blocks.
struct Selection {
  int64_t first_token;
  int64_t tokens;
  int64_t first_head;
  int64_t heads;
};

// One part of the selected heads in all layers, and where it lies in the slab.
struct HeadPart {
  Parts parts;
  std::vector<float> scales;  // one a layer, or none
  HeadSlab slab;              // without scales, which lie where the kernel runs
};

// The tokens of a run that begins with the first block of the table.
inline TokenRun selected(TokenRun run, const Selection& selection) {
  const int64_t before = selection.first_token / run.tiling.tokens;
  run.blocks += before;
  run.num_blocks -= before;
  run.skipped = selection.first_token - before * run.tiling.tokens;
  return run;
}

// Blocks in which no selected token is may be any.
inline void check_selected_bounds(
    const Tensor& blocks, const Selection& selection, int64_t block_tokens,
    const std::vector<Tensor>& parts) {
  const auto* const numbers = static_cast<const int64_t*>(blocks.data_ptr());
  const int64_t first = selection.first_token / block_tokens;
  const int64_t end = selection.first_token + selection.tokens;
  for (int64_t i = first; i * block_tokens < end && selection.tokens > 0; ++i) {
    for (const Tensor& part : parts) {
      STD_TORCH_CHECK(
          numbers[i] >= 0 && numbers[i] < part.size(0), "block ", numbers[i],
          " lies outside a plane of ", part.size(0), " blocks");
    }
  }
}

inline void check_selection(const Selection& selection, const Parts& parts, const Tensor& blocks) {
  const int64_t room = blocks.numel() * parts.tiling.tokens;
  STD_TORCH_CHECK(
      selection.first_token >= 0 && selection.tokens >= 0 && selection.tokens <= room &&
          selection.first_token <= room - selection.tokens,
      selection.tokens, " tokens from ", selection.first_token, " are not in ", blocks.numel(),
      " blocks of ", parts.tiling.tokens);
  STD_TORCH_CHECK(
      selection.first_head >= 0 && selection.heads >= 0 && selection.heads <= parts.heads &&
          selection.first_head <= parts.heads - selection.heads,
      selection.heads, " heads from ", selection.first_head, " are not among ", parts.heads);
}

// The scales of one part of `num_parts`, for each layer; none where nothing is divided.
inline std::vector<float> scales_of(
    const std::vector<double>& scales, size_t part, size_t num_parts, size_t layers) {
  STD_TORCH_CHECK(
      scales.size() == layers * num_parts, scales.size(), " scales were given, ",
      layers * num_parts, " are needed");
  std::vector<float> result;
  for (size_t layer = 0; layer < layers; ++layer) {
    const auto scale = static_cast<float>(scales[layer * num_parts + part]);
    STD_TORCH_CHECK(std::isfinite(scale) && scale > 0, "a scale of ", scale, " divides nothing");
    result.push_back(scale);
  }
  return result;
}

inline void check_typed_slab(const Tensor& slab, const Tensor& part, int64_t elements) {
  STD_TORCH_CHECK(
      slab.dim() == 1 && slab.is_contiguous() && slab.get_device() == part.get_device(),
      "a slab is one contiguous dimension, on the device of the planes");
  STD_TORCH_CHECK(
      slab.numel() == elements, "the slab has ", slab.numel(), " elements, ", elements,
      " are needed");
  STD_TORCH_CHECK(
      reinterpret_cast<uintptr_t>(slab.data_ptr()) % slab.element_size() == 0,
      "a slab begins at a multiple of its elements' ", slab.element_size(), " bytes");
}

// Parts come layer by layer.
inline std::vector<HeadPart> check_heads(
    const std::vector<Tensor>& tensors, int64_t layers, const Tensor& blocks,
    const Selection& selection, const std::vector<double>& scales, const Tensor& slab,
    bool is_gathered) {
  const auto count = static_cast<int64_t>(tensors.size());
  STD_TORCH_CHECK(
      layers > 0 && count > 0 && count % layers == 0, count, " parts are not those of ", layers,
      " layers");
  const auto num_parts = static_cast<size_t>(count / layers);
  const Tensor& first = tensors[0];
  check_blocks(blocks, first);
  const Element in_slab = element_of(slab);
  std::vector<HeadPart> result;
  int64_t channels = 0;
  for (size_t part = 0; part < num_parts; ++part) {
    std::vector<Tensor> of_layers;
    for (size_t i = part; i < tensors.size(); i += num_parts) of_layers.push_back(tensors[i]);
    Parts parts = check_parts(of_layers);
    for (int64_t i = 1; i < 6; ++i) {
      STD_TORCH_CHECK(of_layers[0].size(i) > 0, "a part has nothing in dimension ", i);
    }
    const int64_t width = parts.tiling.width;
    STD_TORCH_CHECK(
        width <= kMaxWidth, "rows of ", width, " channels are too wide; ", kMaxWidth,
        " are allowed");
    STD_TORCH_CHECK(
        of_layers[0].scalar_type() == first.scalar_type() &&
            of_layers[0].get_device() == first.get_device() && parts.heads == first.size(1) &&
            parts.tiling.tokens == first.size(2) * first.size(3),
        "the parts of a layer differ in heads, tokens, dtype or device");
    check_selection(selection, parts, blocks);
    const Element from = is_gathered ? parts.element : in_slab;
    const Element to = is_gathered ? in_slab : parts.element;
    STD_TORCH_CHECK(can_convert(from, to), "fp8_e4m3 cannot become another type");
    std::vector<float> of_part;
    if (from != to && to == Element::kFloat8) {
      of_part = scales_of(scales, part, num_parts, static_cast<size_t>(layers));
    }
    for (PartPlane& plane : parts.parts) plane.base += selection.first_head * plane.head_stride;
    parts.heads = selection.heads;
    result.push_back({std::move(parts), std::move(of_part), {in_slab, 0, channels, nullptr}});
    channels += width;
  }
  for (HeadPart& part : result) part.slab.channels = channels;
  check_typed_slab(slab, first, layers * selection.tokens * selection.heads * channels);
  return result;
}

}  // namespace pd::bindings
