#include <cstddef>

#include "api.h"
#include "cuda/layout.h"

namespace gapo {
namespace cuda {

Plan make_plan(const std::vector<int64_t>& lengths, const Selection& selection) {
  int64_t total = 0;
  for (int64_t length : lengths) total += length;
  Plan plan;
  plan.first_run.assign(lengths.size() + 1, 0);
  plan.first_chunk.assign(lengths.size() + 1, 0);
  int64_t chunk = 0;
  for (const Run& run : selected_runs(lengths, selection, 0, total)) {
    plan.table.insert(plan.table.end(), {run.begin, run.end, chunk});
    chunk += (run.end - run.begin + kChunk - 1) / kChunk;
    plan.first_run[run.piece + 1] = static_cast<int64_t>(plan.table.size()) / kRunFields;
    plan.first_chunk[run.piece + 1] = chunk;
  }
  for (std::size_t piece = 1; piece < plan.first_run.size(); ++piece) {
    if (plan.first_run[piece] != 0) continue;  // a piece without runs ends where it starts
    plan.first_run[piece] = plan.first_run[piece - 1];
    plan.first_chunk[piece] = plan.first_chunk[piece - 1];
  }
  return plan;
}

}  // namespace cuda
}  // namespace gapo
