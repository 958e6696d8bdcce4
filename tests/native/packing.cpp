#include <algorithm>

#include "planes.h"

namespace {

// A slab begins anywhere, and ends where its last byte is.
void test_packing_of(int64_t row_bytes, const Gaps& gaps) {
  Planes planes(row_bytes, gaps);
  planes.number();
  const pd::BlockRun run = planes.run();
  std::vector<char> expected(static_cast<size_t>(gaps.start), kSentinel);
  planes.for_each_row(
      [&](const char* row) { expected.insert(expected.end(), row, row + row_bytes); });

  // In two shares, as two threads would.
  std::vector<char> slab(expected.size(), kSentinel);
  pd::pack_blocks_cpu(run, slab.data() + gaps.start, 2, pd::packing_items(run));
  pd::pack_blocks_cpu(run, slab.data() + gaps.start, 0, 2);
  REQUIRE(slab == expected, "rows of %d bytes", static_cast<int>(row_bytes));

  Planes unpacked(row_bytes, gaps), wanted(row_bytes, gaps);
  const char* next = slab.data() + gaps.start;
  wanted.for_each_row([&](char* row) {
    std::copy(next, next + row_bytes, row);
    next += row_bytes;
  });
  pd::unpack_blocks_cpu(unpacked.run(), slab.data() + gaps.start, 0, 1);
  pd::unpack_blocks_cpu(unpacked.run(), slab.data() + gaps.start, 1, pd::packing_items(run));
  REQUIRE(unpacked.memory == wanted.memory, "rows of %d bytes", static_cast<int>(row_bytes));
}

}  // namespace

int test_packing() { return for_planes(test_packing_of); }
