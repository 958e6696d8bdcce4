// The module _C_cuda: CUDA kernels for the ops of _C. What it needs of torch is in every build of
// LibTorch, those for CPUs included, and the CUDA runtime is linked in: it is compiled where nvcc
// is, whatever torch is there, and serves a torch of another CUDA version, too.
#include <Python.h>
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "heads.h"

namespace pd::bindings {
namespace {

// In the place of torch's STD_CUDA_CHECK, which only CUDA builds of LibTorch have.
void check(cudaError_t status) {
  STD_TORCH_CHECK(status == cudaSuccess, "CUDA: ", cudaGetErrorString(status));
}

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

  // Null where there are none.
  const float* with(const std::vector<float>& scales) {
    return scales.empty() ? nullptr : copied(scales);
  }

 private:
  template <class Item>
  const Item* copied(const std::vector<Item>& items) {
    const auto bytes = static_cast<int64_t>(items.size() * sizeof(Item));
    const Tensor& there = copies_.emplace_back(torch::stable::new_empty(blocks_, {bytes / 8 + 1}));
    check(cudaMemcpyAsync(
        there.data_ptr(), items.data(), bytes, cudaMemcpyHostToDevice,
        static_cast<cudaStream_t>(stream_)));
    return static_cast<const Item*>(there.data_ptr());
  }

  const Tensor& blocks_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_;
  std::vector<Tensor> copies_;
};

// Checks what packing and unpacking have in common, and calls launch(run, slab, stream).
template <class Launch>
void with_slab(
    const std::vector<Tensor>& planes, const Tensor& blocks, const Tensor& slab, Launch launch) {
  const Planes checked = check_planes(planes);
  check_blocks(blocks, planes[0]);
  OnDevice device(blocks);
  const pd::BlockRun run = device.with(checked);
  check_slab(slab, planes[0], packed_bytes(run));
  launch(run, static_cast<char*>(slab.data_ptr()), device.stream());
  check(cudaGetLastError());
}

void pack_blocks_cuda(std::vector<Tensor> planes, Tensor blocks, Tensor slab) {
  with_slab(planes, blocks, slab, pd::pack_blocks_cuda);
}

void unpack_blocks_cuda(Tensor slab, Tensor blocks, std::vector<Tensor> planes) {
  with_slab(planes, blocks, slab, pd::unpack_blocks_cuda);
}

// The same of encoding and decoding: launch(run, encoding, slab, stream).
template <class Launch>
void with_codes(
    const std::vector<Tensor>& parts, const Tensor& blocks, int64_t tokens,
    const pd::Encoding& encoding, const Tensor& slab, Launch launch) {
  const Parts checked = check_parts(parts);
  check_blocks(blocks, parts[0]);
  check_tokens(tokens, blocks, checked.tiling.tokens);
  OnDevice device(blocks);
  const pd::TokenRun run = device.with(checked, tokens);
  check_encoding(run, encoding, slab, parts[0]);
  launch(run, encoding, static_cast<char*>(slab.data_ptr()), device.stream());
  check(cudaGetLastError());
}

void encode_blocks_cuda(
    std::vector<Tensor> parts, Tensor blocks, int64_t tokens, int64_t bits, int64_t group,
    bool by_channel, int64_t sinks, Tensor slab) {
  with_codes(parts, blocks, tokens, {bits, by_channel, group, sinks}, slab, pd::encode_blocks_cuda);
}

void decode_blocks_cuda(
    Tensor slab, Tensor blocks, int64_t tokens, int64_t bits, int64_t group, bool by_channel,
    int64_t sinks, std::vector<Tensor> parts) {
  with_codes(parts, blocks, tokens, {bits, by_channel, group, sinks}, slab, pd::decode_blocks_cuda);
}

// The same of gathering and scattering: launch(run, place in the slab, slab, stream).
template <class Launch>
void with_heads(
    const std::vector<Tensor>& parts, int64_t layers, const Tensor& blocks,
    const Selection& selection, const std::vector<double>& scales, const Tensor& slab,
    bool is_gathered, Launch launch) {
  const std::vector<HeadPart> checked =
      check_heads(parts, layers, blocks, selection, scales, slab, is_gathered);
  OnDevice device(blocks);
  for (const HeadPart& part : checked) {
    HeadSlab place = part.slab;
    place.scales = device.with(part.scales);
    const pd::TokenRun run = selected(device.with(part.parts, selection.tokens), selection);
    launch(run, place, static_cast<char*>(slab.data_ptr()), device.stream());
    check(cudaGetLastError());
  }
}

void gather_heads_cuda(
    std::vector<Tensor> parts, int64_t layers, Tensor blocks, int64_t first_token, int64_t tokens,
    int64_t first_head, int64_t heads, std::vector<double> scales, Tensor slab) {
  const Selection selection{first_token, tokens, first_head, heads};
  with_heads(parts, layers, blocks, selection, scales, slab, true, pd::gather_heads_cuda);
}

void scatter_heads_cuda(
    Tensor slab, Tensor blocks, int64_t first_token, int64_t tokens, int64_t first_head,
    int64_t heads, std::vector<double> scales, int64_t layers, std::vector<Tensor> parts) {
  const Selection selection{first_token, tokens, first_head, heads};
  with_heads(parts, layers, blocks, selection, scales, slab, false, pd::scatter_heads_cuda);
}

Tensor digest_blocks_cuda(std::vector<Tensor> planes, Tensor blocks) {
  const Planes checked = check_planes(planes);
  check_blocks(blocks, planes[0]);
  OnDevice device(blocks);
  const pd::BlockRun run = device.with(checked);
  Tensor result = torch::stable::new_zeros(blocks, {1});
  pd::digest_blocks_cuda(run, static_cast<uint64_t*>(result.data_ptr()), device.stream());
  check(cudaGetLastError());
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(vllm_pd_plugin, CUDA, ops) {
  ops.impl("pack_blocks", TORCH_BOX(&pack_blocks_cuda));
  ops.impl("unpack_blocks", TORCH_BOX(&unpack_blocks_cuda));
  ops.impl("encode_blocks", TORCH_BOX(&encode_blocks_cuda));
  ops.impl("decode_blocks", TORCH_BOX(&decode_blocks_cuda));
  ops.impl("gather_heads", TORCH_BOX(&gather_heads_cuda));
  ops.impl("scatter_heads", TORCH_BOX(&scatter_heads_cuda));
  ops.impl("digest_blocks", TORCH_BOX(&digest_blocks_cuda));
}

// Returns the newest CUDA version that this machine's driver knows, as CUDART_VERSION; 0 without
// one.
int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace
}  // namespace pd::bindings

// Importing the module is what registers the kernels. It raises ImportError where they could not
// run: a driver serves the CUDA runtimes of its own major version and older.
extern "C" PyObject* PyInit__C_cuda(void) {
  const int driver = pd::bindings::driver_version();
  if (driver == 0) {
    PyErr_SetString(PyExc_ImportError, "there is no CUDA driver here");
    return nullptr;
  }
  if (driver / 1000 < CUDART_VERSION / 1000) {
    return PyErr_Format(
        PyExc_ImportError, "it was built with CUDA %d.%d, and the driver here serves CUDA %d.%d",
        CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10, driver / 1000, driver % 1000 / 10);
  }
  static PyModuleDef module = {};
  module.m_base = PyModuleDef_HEAD_INIT;
  module.m_name = "_C_cuda";
  module.m_size = -1;
  return PyModule_Create(&module);
}
