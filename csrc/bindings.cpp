// The ops as PyTorch sees them, over LibTorch's stable ABI: one build serves every torch from
// TORCH_TARGET_VERSION on. Arguments are checked here; the kernels trust them.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#ifdef PD_USE_CUDA
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#include <vector>

#include "ops.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Planes {
  std::vector<pd::Plane> planes;
  pd::BlockShape shape;

  // Every pointer is the host's.
  pd::BlockRun run(const Tensor& blocks) const {
    return {
        planes.data(), static_cast<int64_t>(planes.size()), shape,
        static_cast<const int64_t*>(blocks.data_ptr()), blocks.numel()};
  }
};

struct Parts {
  std::vector<pd::PartPlane> parts;
  int64_t heads;
  pd::Element element;
  pd::Tiling tiling;

  pd::TokenRun run(const Tensor& blocks, int64_t tokens) const {
    return {parts.data(),   static_cast<int64_t>(parts.size()),
            heads,          element,
            tiling,         static_cast<const int64_t*>(blocks.data_ptr()),
            blocks.numel(), tokens};
  }
};

// Planes are [num_blocks, heads, tokens, width], equal but for their number of blocks and strides.
Planes check_planes(const std::vector<Tensor>& planes) {
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

pd::Element element_of(const Tensor& plane) {
  switch (plane.scalar_type()) {
    case ScalarType::Float:
      return pd::Element::kFloat32;
    case ScalarType::BFloat16:
      return pd::Element::kBFloat16;
    case ScalarType::Half:
      return pd::Element::kFloat16;
    default:
      STD_TORCH_CHECK(false, "only float32, bfloat16 and float16 can be encoded");
  }
}

// Parts are [num_blocks, heads, token tiles, tokens of a tile, channel tiles, channels of a tile],
// equal but for their number of blocks and the strides of blocks and heads.
Parts check_parts(const std::vector<Tensor>& parts) {
  STD_TORCH_CHECK(!parts.empty(), "no parts were given");
  const Tensor& first = parts[0];
  STD_TORCH_CHECK(first.dim() == 6, "a part has 6 dimensions, not ", first.dim());
  const auto size = static_cast<int64_t>(first.element_size());
  const pd::Tiling tiling{
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

void check_blocks(const Tensor& blocks, const Tensor& plane) {
  STD_TORCH_CHECK(
      blocks.dim() == 1 && blocks.scalar_type() == ScalarType::Long && blocks.is_contiguous(),
      "blocks must be one contiguous dimension of int64");
  STD_TORCH_CHECK(
      blocks.get_device() == plane.get_device(), "blocks must be on the device of the planes");
}

// Not on a device: that would wait for it.
void check_bounds(const Tensor& blocks, const std::vector<Tensor>& planes) {
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
void check_tokens(int64_t tokens, const Tensor& blocks, int64_t block_tokens) {
  const int64_t room = blocks.numel() * block_tokens;
  STD_TORCH_CHECK(
      tokens <= room && tokens > room - block_tokens, tokens, " tokens are not those of ",
      blocks.numel(), " blocks of ", block_tokens);
}

void check_slab(const Tensor& slab, const Tensor& plane, int64_t bytes) {
  STD_TORCH_CHECK(
      slab.dim() == 1 && slab.scalar_type() == ScalarType::Byte && slab.is_contiguous() &&
          slab.get_device() == plane.get_device(),
      "a slab is one contiguous dimension of uint8, on the device of the planes");
  STD_TORCH_CHECK(
      slab.numel() == bytes, "the slab has ", slab.numel(), " bytes, ", bytes, " are needed");
}

int64_t packed_bytes(const pd::BlockRun& run) {
  return run.num_planes * run.num_blocks * run.block_bytes();
}

// Checks all that an encoding needs, and returns it.
pd::Encoding check_encoding(
    const pd::TokenRun& run, int64_t bits, int64_t group, bool by_channel, int64_t sinks,
    const Tensor& slab, const Tensor& part) {
  const int64_t width = run.tiling.width;
  STD_TORCH_CHECK(bits == 2 || bits == 4 || bits == 8, "bits must be 2, 4 or 8, not ", bits);
  STD_TORCH_CHECK(
      width <= pd::kMaxWidth, "rows of ", width, " channels are too wide; ", pd::kMaxWidth,
      " are allowed");
  STD_TORCH_CHECK(
      width % (8 / bits) == 0, width, " channels of ", bits, " bits do not fill whole bytes");
  STD_TORCH_CHECK(
      by_channel || (group > 0 && (bits == 8 || width % group == 0)), "groups of ", group,
      " channels do not divide ", width);
  STD_TORCH_CHECK(sinks >= 0, "sinks must not be negative");
  STD_TORCH_CHECK(
      reinterpret_cast<uintptr_t>(slab.data_ptr()) % pd::kAlignment == 0,
      "a slab begins at a multiple of ", pd::kAlignment, " bytes");
  const pd::Encoding encoding{bits, by_channel, group, sinks};
  const pd::Stripe stripe{run.tokens, width, encoding};
  check_slab(slab, part, run.num_parts * run.heads * stripe.bytes());
  return encoding;
}

// Each thread gets so much that starting it pays. A connector's pieces are smaller, and it has one
// core to itself at best: it is not to take those that the model computes on.
constexpr int64_t kBytesPerThread = 16 << 20;

// Works on items (blocks, or stripes) of `bytes` in all, on as many threads as the caller's PyTorch
// has at the most.
template <class Work>
void in_parallel(int64_t items, int64_t bytes, const Work& work) {
  const int64_t grain = bytes > 0 ? items * kBytesPerThread / bytes + 1 : items + 1;
  torch::stable::parallel_for(0, items, grain, work);
}

void pack_blocks_cpu(std::vector<Tensor> planes, Tensor blocks, Tensor slab) {
  const Planes checked = check_planes(planes);
  check_blocks(blocks, planes[0]);
  check_bounds(blocks, planes);
  const pd::BlockRun run = checked.run(blocks);
  check_slab(slab, planes[0], packed_bytes(run));
  auto* const bytes = static_cast<char*>(slab.data_ptr());
  in_parallel(pd::packing_items(run), slab.numel(), [&](int64_t first, int64_t last) {
    pd::pack_blocks_cpu(run, bytes, first, last);
  });
}

void unpack_blocks_cpu(Tensor slab, Tensor blocks, std::vector<Tensor> planes) {
  const Planes checked = check_planes(planes);
  check_blocks(blocks, planes[0]);
  check_bounds(blocks, planes);
  const pd::BlockRun run = checked.run(blocks);
  check_slab(slab, planes[0], packed_bytes(run));
  const auto* const bytes = static_cast<const char*>(slab.data_ptr());
  in_parallel(pd::packing_items(run), slab.numel(), [&](int64_t first, int64_t last) {
    pd::unpack_blocks_cpu(run, bytes, first, last);
  });
}

void encode_blocks_cpu(
    std::vector<Tensor> parts, Tensor blocks, int64_t tokens, int64_t bits, int64_t group,
    bool by_channel, int64_t sinks, Tensor slab) {
  const Parts checked = check_parts(parts);
  check_blocks(blocks, parts[0]);
  check_bounds(blocks, parts);
  check_tokens(tokens, blocks, checked.tiling.tokens);
  const pd::TokenRun run = checked.run(blocks, tokens);
  const pd::Encoding encoding = check_encoding(run, bits, group, by_channel, sinks, slab, parts[0]);
  auto* const bytes = static_cast<char*>(slab.data_ptr());
  in_parallel(pd::encoding_items(run), slab.numel(), [&](int64_t first, int64_t last) {
    pd::encode_blocks_cpu(run, encoding, bytes, first, last);
  });
}

void decode_blocks_cpu(
    Tensor slab, Tensor blocks, int64_t tokens, int64_t bits, int64_t group, bool by_channel,
    int64_t sinks, std::vector<Tensor> parts) {
  const Parts checked = check_parts(parts);
  check_blocks(blocks, parts[0]);
  check_bounds(blocks, parts);
  check_tokens(tokens, blocks, checked.tiling.tokens);
  const pd::TokenRun run = checked.run(blocks, tokens);
  const pd::Encoding encoding = check_encoding(run, bits, group, by_channel, sinks, slab, parts[0]);
  const auto* const bytes = static_cast<const char*>(slab.data_ptr());
  in_parallel(pd::encoding_items(run), slab.numel(), [&](int64_t first, int64_t last) {
    pd::decode_blocks_cpu(run, encoding, bytes, first, last);
  });
}

Tensor digest_blocks_cpu(std::vector<Tensor> planes, Tensor blocks) {
  const Planes checked = check_planes(planes);
  check_blocks(blocks, planes[0]);
  check_bounds(blocks, planes);
  Tensor result = torch::stable::new_empty(blocks, {1});
  *static_cast<uint64_t*>(result.data_ptr()) = pd::digest_blocks_cpu(checked.run(blocks));
  return result;
}

#ifdef PD_USE_CUDA

// The device and the stream that the caller works on, and what lies there for the kernels.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& blocks)
      : blocks_(blocks),
        guard_(blocks.get_device_index()),
        stream_(
            torch::stable::accelerator::getCurrentStream(blocks.get_device_index())
                .nativeHandle()) {}

  void* stream() const { return stream_; }

  pd::BlockRun with(const Planes& planes) {
    pd::BlockRun run = planes.run(blocks_);
    run.planes = copied(planes.planes);
    return run;
  }

  pd::TokenRun with(const Parts& parts, int64_t tokens) {
    pd::TokenRun run = parts.run(blocks_, tokens);
    run.parts = copied(parts.parts);
    return run;
  }

 private:
  template <class Item>
  const Item* copied(const std::vector<Item>& items) {
    const auto bytes = static_cast<int64_t>(items.size() * sizeof(Item));
    items_ = torch::stable::new_empty(blocks_, {bytes / 8});
    STD_CUDA_CHECK(cudaMemcpyAsync(
        items_.data_ptr(), items.data(), bytes, cudaMemcpyHostToDevice,
        static_cast<cudaStream_t>(stream_)));
    return static_cast<const Item*>(items_.data_ptr());
  }

  const Tensor& blocks_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_;
  Tensor items_;
};

void pack_blocks_cuda(std::vector<Tensor> planes, Tensor blocks, Tensor slab) {
  const Planes checked = check_planes(planes);
  check_blocks(blocks, planes[0]);
  OnDevice device(blocks);
  const pd::BlockRun run = device.with(checked);
  check_slab(slab, planes[0], packed_bytes(run));
  pd::pack_blocks_cuda(run, static_cast<char*>(slab.data_ptr()), device.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void unpack_blocks_cuda(Tensor slab, Tensor blocks, std::vector<Tensor> planes) {
  const Planes checked = check_planes(planes);
  check_blocks(blocks, planes[0]);
  OnDevice device(blocks);
  const pd::BlockRun run = device.with(checked);
  check_slab(slab, planes[0], packed_bytes(run));
  pd::unpack_blocks_cuda(run, static_cast<const char*>(slab.data_ptr()), device.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void encode_blocks_cuda(
    std::vector<Tensor> parts, Tensor blocks, int64_t tokens, int64_t bits, int64_t group,
    bool by_channel, int64_t sinks, Tensor slab) {
  const Parts checked = check_parts(parts);
  check_blocks(blocks, parts[0]);
  check_tokens(tokens, blocks, checked.tiling.tokens);
  OnDevice device(blocks);
  const pd::TokenRun run = device.with(checked, tokens);
  const pd::Encoding encoding = check_encoding(run, bits, group, by_channel, sinks, slab, parts[0]);
  pd::encode_blocks_cuda(run, encoding, static_cast<char*>(slab.data_ptr()), device.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void decode_blocks_cuda(
    Tensor slab, Tensor blocks, int64_t tokens, int64_t bits, int64_t group, bool by_channel,
    int64_t sinks, std::vector<Tensor> parts) {
  const Parts checked = check_parts(parts);
  check_blocks(blocks, parts[0]);
  check_tokens(tokens, blocks, checked.tiling.tokens);
  OnDevice device(blocks);
  const pd::TokenRun run = device.with(checked, tokens);
  const pd::Encoding encoding = check_encoding(run, bits, group, by_channel, sinks, slab, parts[0]);
  pd::decode_blocks_cuda(run, encoding, static_cast<const char*>(slab.data_ptr()), device.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor digest_blocks_cuda(std::vector<Tensor> planes, Tensor blocks) {
  const Planes checked = check_planes(planes);
  check_blocks(blocks, planes[0]);
  OnDevice device(blocks);
  const pd::BlockRun run = device.with(checked);
  Tensor result = torch::stable::new_zeros(blocks, {1});
  pd::digest_blocks_cuda(run, static_cast<uint64_t*>(result.data_ptr()), device.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(vllm_pd_plugin, CUDA, ops) {
  ops.impl("pack_blocks", TORCH_BOX(&pack_blocks_cuda));
  ops.impl("unpack_blocks", TORCH_BOX(&unpack_blocks_cuda));
  ops.impl("encode_blocks", TORCH_BOX(&encode_blocks_cuda));
  ops.impl("decode_blocks", TORCH_BOX(&decode_blocks_cuda));
  ops.impl("digest_blocks", TORCH_BOX(&digest_blocks_cuda));
}

#endif

STABLE_TORCH_LIBRARY(vllm_pd_plugin, ops) {
  ops.def("pack_blocks(Tensor[] planes, Tensor blocks, Tensor(a!) slab) -> ()");
  ops.def("unpack_blocks(Tensor slab, Tensor blocks, Tensor(a!)[] planes) -> ()");
  ops.def(
      "encode_blocks(Tensor[] parts, Tensor blocks, int tokens, int bits, int group, "
      "bool by_channel, int sinks, Tensor(a!) slab) -> ()");
  ops.def(
      "decode_blocks(Tensor slab, Tensor blocks, int tokens, int bits, int group, "
      "bool by_channel, int sinks, Tensor(a!)[] parts) -> ()");
  ops.def("digest_blocks(Tensor[] planes, Tensor blocks) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_pd_plugin, CPU, ops) {
  ops.impl("pack_blocks", TORCH_BOX(&pack_blocks_cpu));
  ops.impl("unpack_blocks", TORCH_BOX(&unpack_blocks_cpu));
  ops.impl("encode_blocks", TORCH_BOX(&encode_blocks_cpu));
  ops.impl("decode_blocks", TORCH_BOX(&decode_blocks_cpu));
  ops.impl("digest_blocks", TORCH_BOX(&digest_blocks_cpu));
}

}  // namespace

// Importing the module is what registers the ops.
extern "C" PyObject* PyInit__C(void) {
  static PyModuleDef module = {};
  module.m_base = PyModuleDef_HEAD_INIT;
  module.m_name = "_C";
  module.m_size = -1;
  return PyModule_Create(&module);
}
