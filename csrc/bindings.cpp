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

struct Arguments {
  std::vector<pd::Plane> planes;
  pd::BlockShape shape;
};

// Planes are [num_blocks, heads, tokens, width], equal but for their number of blocks and strides.
Arguments check_planes(const std::vector<Tensor>& planes) {
  STD_TORCH_CHECK(!planes.empty(), "no planes were given");
  const Tensor& first = planes[0];
  STD_TORCH_CHECK(first.dim() == 4, "a plane has 4 dimensions, not ", first.dim());
  const auto element = static_cast<int64_t>(first.element_size());
  Arguments result{{}, {first.size(1), first.size(2), first.size(3) * element}};
  for (const Tensor& plane : planes) {
    const bool is_equal = plane.dim() == 4 && plane.scalar_type() == first.scalar_type() &&
                          plane.size(1) == first.size(1) && plane.size(2) == first.size(2) &&
                          plane.size(3) == first.size(3) &&
                          plane.get_device() == first.get_device();
    STD_TORCH_CHECK(is_equal, "planes differ in shape, dtype or device");
    STD_TORCH_CHECK(
        plane.size(3) == 1 || plane.stride(3) == 1, "elements of a row must touch each other");
    result.planes.push_back(
        {static_cast<const char*>(plane.data_ptr()), plane.stride(0) * element,
         plane.stride(1) * element, plane.stride(2) * element});
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

Tensor digest_blocks_cpu(std::vector<Tensor> planes, Tensor blocks) {
  const Arguments arguments = check_planes(planes);
  check_blocks(blocks, planes[0]);
  check_bounds(blocks, planes);
  Tensor result = torch::stable::new_empty(blocks, {1});
  *static_cast<uint64_t*>(result.data_ptr()) = pd::digest_blocks_cpu(
      arguments.planes.data(), static_cast<int64_t>(arguments.planes.size()), arguments.shape,
      static_cast<const int64_t*>(blocks.data_ptr()), blocks.numel());
  return result;
}

#ifdef PD_USE_CUDA

// Bounds are not checked: that would wait for the device.
Tensor digest_blocks_cuda(std::vector<Tensor> planes, Tensor blocks) {
  const Arguments arguments = check_planes(planes);
  check_blocks(blocks, planes[0]);
  const auto device = planes[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* const stream = torch::stable::accelerator::getCurrentStream(device).nativeHandle();
  const auto num_planes = static_cast<int64_t>(arguments.planes.size());
  const auto bytes = static_cast<int64_t>(arguments.planes.size() * sizeof(pd::Plane));
  Tensor on_device = torch::stable::new_empty(blocks, {bytes / 8});
  STD_CUDA_CHECK(cudaMemcpyAsync(
      on_device.data_ptr(), arguments.planes.data(), bytes, cudaMemcpyHostToDevice,
      static_cast<cudaStream_t>(stream)));
  Tensor result = torch::stable::new_zeros(blocks, {1});
  pd::digest_blocks_cuda(
      static_cast<const pd::Plane*>(on_device.data_ptr()), num_planes, arguments.shape,
      static_cast<const int64_t*>(blocks.data_ptr()), blocks.numel(),
      static_cast<uint64_t*>(result.data_ptr()), stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(vllm_pd_plugin, CUDA, ops) {
  ops.impl("digest_blocks", TORCH_BOX(&digest_blocks_cuda));
}

#endif

STABLE_TORCH_LIBRARY(vllm_pd_plugin, ops) {
  ops.def("digest_blocks(Tensor[] planes, Tensor blocks) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_pd_plugin, CPU, ops) {
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
