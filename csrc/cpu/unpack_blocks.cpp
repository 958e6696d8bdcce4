#include <cstring>

#include "block_runs.h"

namespace pd {

void unpack_blocks_cpu(const BlockRun& run, const char* slab, int64_t first, int64_t last) {
  for (int64_t item = first; item < last; ++item) {
    for_each_run(run, item, [slab](char* rows, int64_t place, int64_t bytes) {
      memcpy(rows, slab + place, static_cast<size_t>(bytes));
    });
  }
}

}  // namespace pd
