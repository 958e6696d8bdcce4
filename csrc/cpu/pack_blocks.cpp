#include <cstring>

#include "block_runs.h"

namespace pd {

void pack_blocks_cpu(const BlockRun& run, char* slab, int64_t first, int64_t last) {
  for (int64_t item = first; item < last; ++item) {
    for_each_run(run, item, [slab](const char* rows, int64_t place, int64_t bytes) {
      memcpy(slab + place, rows, static_cast<size_t>(bytes));
    });
  }
}

}  // namespace pd
