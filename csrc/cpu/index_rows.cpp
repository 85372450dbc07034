// SPDX-License-Identifier: Apache-2.0
// Sorts the indices of IndexedSlices, which name rows in any order and more than once. The radix sort is stable: it
// groups the occurrences of a row and keeps their order, so that sums have the same bits for any number of threads.
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

// Copies the indices. Records for each block the position of its first invalid index, and whether its indices ascend.
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

// Sorts by one digit, in two passes. The first counts the digits of each block; sort_by_digit() turns the counts into
// the positions at which the second pass stores the keys.
struct DigitTask {
  const IndexArgs& args;
  int64_t blocks;
  int shift;
  bool scatter;
  std::array<int64_t, kDigits>* counts;  // [block][digit]

  void run_block(int64_t block) const {
    std::array<int64_t, kDigits>& positions = counts[block];
    if (!scatter) positions.fill(0);
    for (int64_t i = share_begin(args.count, block, blocks); i < share_begin(args.count, block + 1, blocks); ++i) {
      int64_t& position = positions[static_cast<size_t>(args.keys[i] >> shift & (kDigits - 1))];
      if (scatter) {
        args.spare_keys[position] = args.keys[i];
        args.spare_order[position] = args.order[i];
      }
      ++position;
    }
  }
};

void sort_by_digit(IndexArgs& args, int threads, int shift, std::vector<std::array<int64_t, kDigits>>& counts) {
  const auto blocks = static_cast<int64_t>(counts.size());
  DigitTask task{args, blocks, shift, false, counts.data()};
  run_blocks(task, blocks, threads);
  int64_t position = 0;
  for (size_t digit = 0; digit < kDigits; ++digit) {
    for (auto& of_block : counts) position += std::exchange(of_block[digit], position);
  }
  task.scatter = true;
  run_blocks(task, blocks, threads);
  std::swap(args.keys, args.spare_keys);
  std::swap(args.order, args.spare_order);
}

// Turns the sorted keys into the unique rows and the start of each.
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
