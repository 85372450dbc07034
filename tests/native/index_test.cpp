// SPDX-License-Identifier: Apache-2.0
// Checks index_rows against a stable sort: order, duplicates, both index types, invalid indices, tables too large to
// exist, several threads. Prints a line per check.
#include <limits>
#include <string>
#include <vector>

#include "../../csrc/core/split.h"
#include "../../csrc/cpu/launch.h"
#include "harness.h"
#include "row_reference.h"

namespace {

using namespace kernel_test;

// The arrays have exactly the sizes that IndexArgs requires, so that AddressSanitizer detects an access behind them.
template <class Index>
struct Sorting {
  std::vector<Index> indices;
  std::vector<int64_t> keys, order, spare_keys, spare_order;
  IndexArgs args{};

  Sorting(const std::vector<int64_t>& rows, int64_t row_count)
      : indices(rows.begin(), rows.end()),
        keys(rows.size() + 1, -7),
        order(rows.size(), -7),
        spare_keys(rows.size() + 1, -7),
        spare_order(rows.size(), -7) {
    args.indices = indices.data();
    args.is_int64 = sizeof(Index) == 8;
    args.count = static_cast<int64_t>(rows.size());
    args.row_count = row_count;
    args.keys = keys.data();
    args.order = order.data();
    args.spare_keys = spare_keys.data();
    args.spare_order = spare_order.data();
    cpu::index_rows(args);
  }
  bool operator==(const Occurrences& expected) const {
    const auto same = [](const int64_t* actual, const std::vector<int64_t>& reference) {
      return std::equal(reference.begin(), reference.end(), actual);
    };
    return args.bad == -1 && args.unique == static_cast<int64_t>(expected.rows.size()) &&
           same(args.keys, expected.rows) && same(args.spare_keys, expected.starts) && same(args.order, expected.order);
  }
};

enum class Order { kAscending, kTwice, kDescending, kRandom, kSame };
constexpr const char* kOrderNames[] = {"ascending", "ascending, each twice", "descending", "random", "all the same"};

std::vector<int64_t> indices_in(Order order, int64_t count, int64_t row_count) {
  Random random{static_cast<uint64_t>(count)};
  const int64_t stride = std::max<int64_t>(1, row_count / std::max<int64_t>(1, count));
  std::vector<int64_t> indices;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t any = static_cast<int64_t>(static_cast<uint64_t>(random.below(~0u)) << 32 | random.below(~0u));
    const int64_t rank = order == Order::kTwice ? i / 2 : order == Order::kDescending ? count - 1 - i : i;
    const int64_t row = order == Order::kRandom ? (any & std::numeric_limits<int64_t>::max())
                        : order == Order::kSame ? row_count - 1
                                                : rank * stride;
    indices.push_back(row % row_count);
  }
  return indices;
}

// Small counts test every number of digits. Large ones add blocks and threads, for which these cases suffice: one digit
// with ascending and with random indices, six digits, and once the maximum number of blocks.
bool is_repetition(Order order, int64_t count, int64_t row_count) {
  if (count > 1000000) return order != Order::kDescending;
  const bool one_digit = row_count == 2048 && (order == Order::kTwice || order == Order::kRandom);
  const bool six = row_count == std::numeric_limits<int64_t>::max() && order == Order::kRandom;
  return count > 16384 && !one_digit && !six;
}

void check_orders() {
  constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
  Claims claims;
  for (const int order : {0, 1, 2, 3, 4}) {
    for (const int64_t count : {0, 1, 2, 3, 1000, 16383, 49157, 1100000}) {
      for (const int64_t row_count :
           {int64_t{1}, int64_t{2}, int64_t{2048}, int64_t{2049}, int64_t{1} << 31, (int64_t{1} << 33) + 5, kMax}) {
        if (count > 1000000 && row_count != 2049) continue;
        if (kSanitized && is_repetition(static_cast<Order>(order), count, row_count)) continue;
        const std::vector<int64_t> indices = indices_in(static_cast<Order>(order), count, row_count);
        const Occurrences expected(indices);
        for (const int threads : {1, 2, 3}) {
          if (threads > 1 && count < 2 * 16384) continue;
          if (kSanitized && threads < 3 && count > 1000000) continue;
          cpu::set_num_threads(threads);
          const std::string claim = std::string(kOrderNames[order]) + " indices, threads: " + std::to_string(threads) +
                                    " give the rows of a stable sort";
          claims.note(claim, Sorting<int64_t>(indices, row_count) == expected);
          if (row_count <= int64_t{1} << 31) claims.note(claim, Sorting<int32_t>(indices, row_count) == expected);
        }
      }
    }
  }
  cpu::set_num_threads(0);
}

// index_rows reports the first invalid index, whichever block it is in.
void check_bad() {
  bool ok = true;
  for (const int threads : {1, 3}) {
    cpu::set_num_threads(threads);
    for (const int64_t count : {3, 50000}) {
      for (const int64_t position : {int64_t{0}, int64_t{1}, count / 2, count - 1}) {
        for (const int64_t wrong : {int64_t{-1}, int64_t{100}, -(int64_t{1} << 31), (int64_t{1} << 31) - 1}) {
          std::vector<int64_t> indices = indices_in(Order::kRandom, count, 100);
          indices[static_cast<size_t>(position)] = wrong;
          indices.back() = wrong;
          ok = ok && Sorting<int32_t>(indices, 100).args.bad == position;
          ok = ok && Sorting<int64_t>(indices, 100).args.bad == position;
          indices[static_cast<size_t>(position)] = (int64_t{1} << 32) + 5;  // a valid row if truncated to 32 bits
          ok = ok && Sorting<int64_t>(indices, 100).args.bad == position;
        }
      }
    }
  }
  ok = ok && Sorting<int64_t>({0}, 0).args.bad == 0 && Sorting<int64_t>({}, 0).args.bad == -1;
  cpu::set_num_threads(0);
  report(ok, "index_rows reports the first invalid index");
}

void check_search() {
  const std::vector<int64_t> row_list{0, 5, int64_t{1} << 31, int64_t{1} << 40};
  const Rows rows{row_list.data(), nullptr, nullptr, 4, 1};
  const Rows none{nullptr, nullptr, nullptr, 0, 1};
  bool ok = first_row_from(none, 3) == 0;
  for (int64_t k = 0; k < 4; ++k) {
    const int64_t row = row_list[static_cast<size_t>(k)];
    ok = ok && first_row_from(rows, row) == k && first_row_from(rows, row + 1) == k + 1;
  }
  report(ok, "first_row_from finds rows beyond 2^31");
}

}  // namespace

int main() {
  check_search();
  check_bad();
  check_orders();
  return failures == 0 ? 0 : 1;
}
