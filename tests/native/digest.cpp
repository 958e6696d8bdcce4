#include "../../csrc/hash.h"
#include "planes.h"

namespace {

// As csrc/hash.h says, one word after the other.
uint64_t expected_digest(const Planes& planes) {
  uint64_t sum = 0, position = 0;
  planes.for_each_row([&](const char* row) {
    for (int64_t word = 0; word < pd::words_of(planes.shape.row_bytes); ++word) {
      sum += pd::hash_word(pd::load_word(row, planes.shape.row_bytes, word), position++);
    }
  });
  return pd::finish_hash(sum, position);
}

void test_digest_of(int64_t row_bytes, const Gaps& gaps) {
  Planes planes(row_bytes, gaps);
  planes.number();
  const uint64_t digest = pd::digest_blocks_cpu(planes.run());
  REQUIRE(digest == expected_digest(planes), "rows of %d bytes", static_cast<int>(row_bytes));
  const int64_t last = planes.shape.rows() - 1;
  ++pd::row_address(planes.planes[1], planes.shape, 3, last)[row_bytes - 1];
  REQUIRE(
      digest != pd::digest_blocks_cpu(planes.run()), "a changed byte is not seen, rows of %d bytes",
      static_cast<int>(row_bytes));
}

}  // namespace

int test_digest() { return for_planes(test_digest_of); }
