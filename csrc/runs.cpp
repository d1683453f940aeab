#include <algorithm>

#include "api.h"

namespace gapo {
namespace {

void cut_at_pieces(const std::vector<int64_t>& starts, int64_t begin, int64_t end,
                   std::vector<Run>& runs) {
  if (begin >= end) return;
  // The last piece that starts at or before `begin`; empty pieces before it share its start.
  int64_t piece = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
  while (begin < end) {
    const int64_t stop = std::min(end, starts[piece + 1]);
    if (begin < stop) runs.push_back({piece, begin - starts[piece], stop - starts[piece]});
    begin = stop;
    ++piece;
  }
}

}  // namespace

std::vector<Run> selected_runs(const std::vector<int64_t>& lengths, const Selection& selection,
                               int64_t begin, int64_t end) {
  std::vector<int64_t> starts{0};
  for (int64_t length : lengths) starts.push_back(starts.back() + length);
  std::vector<Run> runs;
  if (selection.everything) {
    cut_at_pieces(starts, begin, end, runs);
    return runs;
  }
  const auto& segments = selection.segments;
  auto ends_after = [](int64_t position, const Range& range) { return position < range.end; };
  auto it = std::upper_bound(segments.begin(), segments.end(), begin, ends_after);
  for (; it != segments.end() && it->begin < end; ++it)
    cut_at_pieces(starts, std::max(begin, it->begin), std::min(end, it->end), runs);
  return runs;
}

}  // namespace gapo
