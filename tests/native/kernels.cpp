// The kernels without PyTorch, for the sanitizers: every buffer ends where its last byte is.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../../csrc/hash.h"
#include "../../csrc/ops.h"

namespace {

void require(bool condition, const char* what, int64_t width) {
  if (condition) return;
  std::fprintf(stderr, "kernels: %s (rows of %lld bytes)\n", what, static_cast<long long>(width));
  std::exit(1);
}

// Two planes of 5 blocks, 2 heads and 3 tokens; rows are `gap` bytes apart.
struct Planes {
  static constexpr int64_t kBlocks = 5, kHeads = 2, kTokens = 3;

  Planes(int64_t row_bytes, int64_t gap, int64_t offset)
      : shape{kHeads, kTokens, row_bytes}, stride(row_bytes + gap), start(offset) {
    const int64_t rows = kBlocks * kHeads * kTokens;
    for (int plane = 0; plane < 2; ++plane) {
      const int64_t bytes = offset + rows * stride - gap;
      memory.push_back(std::make_unique<char[]>(static_cast<size_t>(bytes)));
      for (int64_t i = 0; i < bytes; ++i) memory.back()[i] = static_cast<char>(0x55);
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t i = 0; i < row_bytes; ++i) {
          *at(plane, row, i) = static_cast<char>(31 * plane + 7 * row + 3 * i);
        }
      }
    }
  }

  char* at(int plane, int64_t row, int64_t byte) {
    return memory[plane].get() + start + row * stride + byte;
  }

  uint64_t digest(const std::vector<int64_t>& blocks) {
    std::vector<pd::Plane> planes;
    for (int plane = 0; plane < 2; ++plane) {
      planes.push_back({at(plane, 0, 0), kHeads * kTokens * stride, kTokens * stride, stride});
    }
    return pd::digest_blocks_cpu(
        planes.data(), 2, shape, blocks.data(), static_cast<int64_t>(blocks.size()));
  }

  // As the header says, one word after the other.
  uint64_t expected(const std::vector<int64_t>& blocks) {
    uint64_t sum = 0, position = 0;
    for (int plane = 0; plane < 2; ++plane) {
      for (const int64_t block : blocks) {
        for (int64_t row = 0; row < shape.rows(); ++row) {
          const char* const from = at(plane, block * shape.rows() + row, 0);
          for (int64_t word = 0; word < pd::words_of(shape.row_bytes); ++word) {
            sum += pd::hash_word(pd::load_word(from, shape.row_bytes, word), position++);
          }
        }
      }
    }
    return pd::finish_hash(sum, position);
  }

  pd::BlockShape shape;
  int64_t stride, start;
  std::vector<std::unique_ptr<char[]>> memory;
};

}  // namespace

int main() {
  const std::vector<int64_t> blocks = {4, 0, 3};
  int cases = 0;
  for (const int64_t row_bytes : {1, 4, 7, 8, 16, 20, 32, 40, 64, 72, 256, 1152}) {
    for (const int64_t gap : {0, 1, 8, 32}) {
      for (const int64_t offset : {0, 1, 8}) {
        Planes planes(row_bytes, gap, offset);
        const uint64_t digest = planes.digest(blocks);
        require(digest == planes.expected(blocks), "the digest is another", row_bytes);
        ++*planes.at(1, Planes(1, 0, 0).shape.rows() * 4 - 1, row_bytes - 1);  // ends block 3
        require(digest != planes.digest(blocks), "a changed byte is not seen", row_bytes);
        ++cases;
      }
    }
  }
  std::printf("kernels: %d cases\n", cases);
  return 0;
}
