// The module _C: the ops as PyTorch sees them, and their CPU kernels, over LibTorch's stable ABI:
// one build serves every torch from TORCH_TARGET_VERSION on.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "heads.h"

namespace pd::bindings {
namespace {

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

// Checks what packing and unpacking have in common, and calls copy(run, slab, first item, last).
template <class Copy>
void with_slab(
    const std::vector<Tensor>& planes, const Tensor& blocks, const Tensor& slab, Copy copy) {
  const Planes checked = check_planes(planes);
  check_blocks(blocks, planes[0]);
  check_bounds(blocks, planes);
  const pd::BlockRun run = checked.run(blocks);
  check_slab(slab, planes[0], packed_bytes(run));
  auto* const bytes = static_cast<char*>(slab.data_ptr());
  in_parallel(pd::packing_items(run), slab.numel(), [&](int64_t first, int64_t last) {
    copy(run, bytes, first, last);
  });
}

void pack_blocks_cpu(std::vector<Tensor> planes, Tensor blocks, Tensor slab) {
  with_slab(planes, blocks, slab, pd::pack_blocks_cpu);
}

void unpack_blocks_cpu(Tensor slab, Tensor blocks, std::vector<Tensor> planes) {
  with_slab(planes, blocks, slab, pd::unpack_blocks_cpu);
}

// The same of encoding and decoding: code(run, encoding, slab, first item, last).
template <class Code>
void with_codes(
    const std::vector<Tensor>& parts, const Tensor& blocks, int64_t tokens,
    const pd::Encoding& encoding, const Tensor& slab, Code code) {
  const Parts checked = check_parts(parts);
  check_blocks(blocks, parts[0]);
  check_bounds(blocks, parts);
  check_tokens(tokens, blocks, checked.tiling.tokens);
  const pd::TokenRun run = checked.run(blocks, tokens);
  check_encoding(run, encoding, slab, parts[0]);
  auto* const bytes = static_cast<char*>(slab.data_ptr());
  in_parallel(pd::encoding_items(run), slab.numel(), [&](int64_t first, int64_t last) {
    code(run, encoding, bytes, first, last);
  });
}

void encode_blocks_cpu(
    std::vector<Tensor> parts, Tensor blocks, int64_t tokens, int64_t bits, int64_t group,
    bool by_channel, int64_t sinks, Tensor slab) {
  with_codes(parts, blocks, tokens, {bits, by_channel, group, sinks}, slab, pd::encode_blocks_cpu);
}

void decode_blocks_cpu(
    Tensor slab, Tensor blocks, int64_t tokens, int64_t bits, int64_t group, bool by_channel,
    int64_t sinks, std::vector<Tensor> parts) {
  with_codes(parts, blocks, tokens, {bits, by_channel, group, sinks}, slab, pd::decode_blocks_cpu);
}

// The same of gathering and scattering: move(run, place in the slab, slab, first item, last).
template <class Move>
void with_heads(
    const std::vector<Tensor>& parts, int64_t layers, const Tensor& blocks,
    const Selection& selection, const std::vector<double>& scales, const Tensor& slab,
    bool is_gathered, Move move) {
  std::vector<HeadPart> checked =
      check_heads(parts, layers, blocks, selection, scales, slab, is_gathered);
  check_selected_bounds(blocks, selection, checked[0].parts.tiling.tokens, parts);
  auto* const bytes = static_cast<char*>(slab.data_ptr());
  const int64_t size = slab.numel() * static_cast<int64_t>(slab.element_size());
  in_parallel(layers * selection.heads, size, [&](int64_t first, int64_t last) {
    for (const HeadPart& part : checked) {
      HeadSlab place = part.slab;
      if (!part.scales.empty()) place.scales = part.scales.data();
      const pd::TokenRun run = selected(part.parts.run(blocks, selection.tokens), selection);
      move(run, place, bytes, first, last);
    }
  });
}

void gather_heads_cpu(
    std::vector<Tensor> parts, int64_t layers, Tensor blocks, int64_t first_token, int64_t tokens,
    int64_t first_head, int64_t heads, std::vector<double> scales, Tensor slab) {
  const Selection selection{first_token, tokens, first_head, heads};
  with_heads(parts, layers, blocks, selection, scales, slab, true, pd::gather_heads_cpu);
}

void scatter_heads_cpu(
    Tensor slab, Tensor blocks, int64_t first_token, int64_t tokens, int64_t first_head,
    int64_t heads, std::vector<double> scales, int64_t layers, std::vector<Tensor> parts) {
  const Selection selection{first_token, tokens, first_head, heads};
  with_heads(parts, layers, blocks, selection, scales, slab, false, pd::scatter_heads_cpu);
}

Tensor digest_blocks_cpu(std::vector<Tensor> planes, Tensor blocks) {
  const Planes checked = check_planes(planes);
  check_blocks(blocks, planes[0]);
  check_bounds(blocks, planes);
  Tensor result = torch::stable::new_empty(blocks, {1});
  *static_cast<uint64_t*>(result.data_ptr()) = pd::digest_blocks_cpu(checked.run(blocks));
  return result;
}

STABLE_TORCH_LIBRARY(vllm_pd_plugin, ops) {
  ops.def("pack_blocks(Tensor[] planes, Tensor blocks, Tensor(a!) slab) -> ()");
  ops.def("unpack_blocks(Tensor slab, Tensor blocks, Tensor(a!)[] planes) -> ()");
  ops.def(
      "encode_blocks(Tensor[] parts, Tensor blocks, int tokens, int bits, int group, "
      "bool by_channel, int sinks, Tensor(a!) slab) -> ()");
  ops.def(
      "decode_blocks(Tensor slab, Tensor blocks, int tokens, int bits, int group, "
      "bool by_channel, int sinks, Tensor(a!)[] parts) -> ()");
  ops.def(
      "gather_heads(Tensor[] parts, int layers, Tensor blocks, int first_token, int tokens, "
      "int first_head, int heads, float[] scales, Tensor(a!) slab) -> ()");
  ops.def(
      "scatter_heads(Tensor slab, Tensor blocks, int first_token, int tokens, int first_head, "
      "int heads, float[] scales, int layers, Tensor(a!)[] parts) -> ()");
  ops.def("digest_blocks(Tensor[] planes, Tensor blocks) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_pd_plugin, CPU, ops) {
  ops.impl("pack_blocks", TORCH_BOX(&pack_blocks_cpu));
  ops.impl("unpack_blocks", TORCH_BOX(&unpack_blocks_cpu));
  ops.impl("encode_blocks", TORCH_BOX(&encode_blocks_cpu));
  ops.impl("decode_blocks", TORCH_BOX(&decode_blocks_cpu));
  ops.impl("gather_heads", TORCH_BOX(&gather_heads_cpu));
  ops.impl("scatter_heads", TORCH_BOX(&scatter_heads_cpu));
  ops.impl("digest_blocks", TORCH_BOX(&digest_blocks_cpu));
}

}  // namespace
}  // namespace pd::bindings

// Importing the module is what registers the ops.
extern "C" PyObject* PyInit__C(void) {
  static PyModuleDef module = {};
  module.m_base = PyModuleDef_HEAD_INIT;
  module.m_name = "_C";
  module.m_size = -1;
  return PyModule_Create(&module);
}
