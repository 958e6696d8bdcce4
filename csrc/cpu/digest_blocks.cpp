#include "../hash.h"
#include "../ops.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace pd {
namespace {

using HashRow = uint64_t (*)(const char* row, int64_t row_bytes, uint64_t position);

uint64_t hash_row(const char* row, int64_t row_bytes, uint64_t position) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < words_of(row_bytes); ++i) {
    sum += hash_word(load_word(row, row_bytes, i), position + i);
  }
  return sum;
}

#ifdef __x86_64__

// Memory is slower than this: wider vectors would gain nothing.
__attribute__((target("avx2"))) uint64_t
hash_row_avx2(const char* row, int64_t row_bytes, uint64_t position) {
  const int64_t vectors = row_bytes / 32;
  const __m256i step = _mm256_set1_epi64x(static_cast<int64_t>(4 * kKeyStep));
  __m256i key = _mm256_set_epi64x(
      static_cast<int64_t>((position + 4) * kKeyStep),
      static_cast<int64_t>((position + 3) * kKeyStep),
      static_cast<int64_t>((position + 2) * kKeyStep),
      static_cast<int64_t>((position + 1) * kKeyStep));
  __m256i sum = _mm256_setzero_si256();
  for (int64_t i = 0; i < vectors; ++i) {
    const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row) + i);
    const __m256i keyed = _mm256_xor_si256(word, key);
    const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
    sum = _mm256_add_epi64(sum, _mm256_add_epi64(word, product));
    key = _mm256_add_epi64(key, step);
  }
  alignas(32) uint64_t lanes[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sum);
  const int64_t done = 32 * vectors;
  return lanes[0] + lanes[1] + lanes[2] + lanes[3] +
         hash_row(row + done, row_bytes - done, position + 4 * vectors);
}

#endif

HashRow choose() {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx2")) return hash_row_avx2;
#endif
  return hash_row;
}

}  // namespace

uint64_t digest_blocks_cpu(const BlockRun& run) {
  static const HashRow hash = choose();
  const BlockShape& shape = run.shape;
  // Tokens, then heads, whose rows touch are hashed as one row: the words are the same.
  uint64_t sum = 0;
  int64_t position = 0;
  for (int64_t p = 0; p < run.num_planes; ++p) {
    const Plane& plane = run.planes[p];
    const bool whole_words = shape.row_bytes % 8 == 0;
    const bool tokens_touch = whole_words && plane.token_stride == shape.row_bytes;
    const int64_t head_bytes = shape.tokens * shape.row_bytes;
    const bool heads_touch = tokens_touch && plane.head_stride == head_bytes;
    const int64_t rows_at_once = heads_touch ? shape.rows() : tokens_touch ? shape.tokens : 1;
    const int64_t bytes_at_once = rows_at_once * shape.row_bytes;
    for (int64_t b = 0; b < run.num_blocks; ++b) {
      for (int64_t row = 0; row < shape.rows(); row += rows_at_once) {
        const char* const address = row_address(plane, shape, run.blocks[b], row);
        sum += hash(address, bytes_at_once, static_cast<uint64_t>(position));
        position += words_of(bytes_at_once);
      }
    }
  }
  return finish_hash(sum, static_cast<uint64_t>(position));
}

}  // namespace pd
