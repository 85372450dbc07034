// SPDX-License-Identifier: Apache-2.0
// IndexedSlices name rows in any order and more than once. A stable radix sort puts the occurrences of a row side by
// side and leaves them in order: the sums have the same bits for any number of threads.
#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "../core/split.h"
#include "launch.h"
#include "pool.h"

namespace fastadam::cpu {
namespace {

constexpr int kDigitBits = 11;
constexpr int64_t kDigits = int64_t{1} << kDigitBits;
constexpr int64_t kIndicesPerBlock = 16384;
constexpr int64_t kMaxBlocks = 64;

// Copies the indices and says of each block where the first bad one is, and whether all ascend.
struct ReadTask {
  const IndexArgs& args;
  int64_t blocks;
  int64_t* bad;
  bool* ascends;

  int64_t at(int64_t i) const {
    return args.is_int64 ? static_cast<const int64_t*>(args.indices)[i] : static_cast<const int32_t*>(args.indices)[i];
  }

  void run_block(int64_t block) const {
    const int64_t begin = share_begin(args.count, block, blocks);
    const int64_t end = share_begin(args.count, block + 1, blocks);
    int64_t before = begin == 0 ? -1 : at(begin - 1);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = at(i);
      if ((row < 0 || row >= args.row_count) && bad[block] < 0) bad[block] = i;
      if (row < before) ascends[block] = false;
      before = row;
      args.keys[i] = row;
      args.order[i] = i;
    }
  }
};

// One digit of the sort: counts[block][digit] becomes where the next of them goes.
struct DigitTask {
  const IndexArgs& args;
  int64_t blocks;
  int shift;
  bool scatter;
  std::array<int64_t, kDigits>* counts;

  void run_block(int64_t block) const {
    std::array<int64_t, kDigits>& places = counts[block];
    if (!scatter) places.fill(0);
    for (int64_t i = share_begin(args.count, block, blocks); i < share_begin(args.count, block + 1, blocks); ++i) {
      int64_t& place = places[static_cast<size_t>(args.keys[i] >> shift & (kDigits - 1))];
      if (scatter) {
        args.spare_keys[place] = args.keys[i];
        args.spare_order[place] = args.order[i];
      }
      ++place;
    }
  }
};

void sort_by_digit(IndexArgs& args, int threads, int shift, std::vector<std::array<int64_t, kDigits>>& counts) {
  const auto blocks = static_cast<int64_t>(counts.size());
  DigitTask task{args, blocks, shift, false, counts.data()};
  run_blocks(task, blocks, threads);
  int64_t place = 0;
  for (size_t digit = 0; digit < kDigits; ++digit) {
    for (auto& of_block : counts) place += std::exchange(of_block[digit], place);
  }
  task.scatter = true;
  run_blocks(task, blocks, threads);
  std::swap(args.keys, args.spare_keys);
  std::swap(args.order, args.spare_order);
}

// The sorted keys, of which equal ones lie side by side, become unique rows and starts.
void find_starts(IndexArgs& args) {
  args.unique = 0;
  for (int64_t i = 0; i < args.count; ++i) {
    if (args.unique > 0 && args.keys[args.unique - 1] == args.keys[i]) continue;
    args.keys[args.unique] = args.keys[i];
    args.spare_keys[args.unique++] = i;
  }
  args.spare_keys[args.unique] = args.count;
}

}  // namespace

void index_rows(IndexArgs& args) {
  const int64_t blocks = std::clamp<int64_t>(args.count / kIndicesPerBlock, 1, kMaxBlocks);
  const int threads = blocks == 1 ? 1 : num_threads();
  std::array<int64_t, kMaxBlocks> bad;
  std::array<bool, kMaxBlocks> ascends;
  bad.fill(-1);
  ascends.fill(true);
  run_blocks(ReadTask{args, blocks, bad.data(), ascends.data()}, blocks, threads);
  const auto* const first = std::find_if(bad.begin(), bad.end(), [](int64_t i) { return i >= 0; });
  args.bad = first == bad.end() ? -1 : *first;
  if (args.bad >= 0) return;
  if (!std::all_of(ascends.begin(), ascends.end(), [](bool ascend) { return ascend; })) {
    std::vector<std::array<int64_t, kDigits>> counts(static_cast<size_t>(blocks));
    for (int shift = 0; shift < 63 && (args.row_count - 1) >> shift > 0; shift += kDigitBits) {
      sort_by_digit(args, threads, shift, counts);
    }
  }
  find_starts(args);
}

}  // namespace fastadam::cpu
