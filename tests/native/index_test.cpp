// SPDX-License-Identifier: Apache-2.0
// Checks index_rows against a stable sort: order, duplicates, both index types, indices that are no rows, tables too
// large to exist, several threads. Prints a line per check.
#include <limits>
#include <string>
#include <vector>

#include "../../csrc/core/split.h"
#include "../../csrc/cpu/launch.h"
#include "harness.h"
#include "row_reference.h"

namespace {

using namespace kernel_test;

// The memory is as long as IndexArgs asks for and ends where AddressSanitizer watches.
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
    const auto same = [](const int64_t* got, const std::vector<int64_t>& wanted) {
      return std::equal(wanted.begin(), wanted.end(), got);
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
    const int64_t in_turn = order == Order::kTwice ? i / 2 : order == Order::kDescending ? count - 1 - i : i;
    const int64_t row = order == Order::kRandom ? (any & std::numeric_limits<int64_t>::max())
                        : order == Order::kSame ? row_count - 1
                                                : in_turn * stride;
    indices.push_back(row % row_count);
  }
  return indices;
}

// Large counts add blocks and threads to what the small ones do with every digit: one digit, where all ascend and where
// they do not, and six; as many blocks as there may be, once.
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

// The first that is not a row, in whichever block it lies.
void check_bad() {
  bool found = true;
  for (const int threads : {1, 3}) {
    cpu::set_num_threads(threads);
    for (const int64_t count : {3, 50000}) {
      for (const int64_t place : {int64_t{0}, int64_t{1}, count / 2, count - 1}) {
        for (const int64_t wrong : {int64_t{-1}, int64_t{100}, -(int64_t{1} << 31), (int64_t{1} << 31) - 1}) {
          std::vector<int64_t> indices = indices_in(Order::kRandom, count, 100);
          indices[static_cast<size_t>(place)] = wrong;
          indices.back() = wrong;
          found = found && Sorting<int32_t>(indices, 100).args.bad == place;
          found = found && Sorting<int64_t>(indices, 100).args.bad == place;
          indices[static_cast<size_t>(place)] = (int64_t{1} << 32) + 5;  // a row, if cut to 32 bits
          found = found && Sorting<int64_t>(indices, 100).args.bad == place;
        }
      }
    }
  }
  found = found && Sorting<int64_t>({0}, 0).args.bad == 0 && Sorting<int64_t>({}, 0).args.bad == -1;
  cpu::set_num_threads(0);
  report(found, "index_rows says which index is the first that is not a row");
}

void check_places() {
  const std::vector<int64_t> places{0, 5, int64_t{1} << 31, int64_t{1} << 40};
  const Rows rows{places.data(), nullptr, nullptr, 4, 1};
  const Rows none{nullptr, nullptr, nullptr, 0, 1};
  bool found = first_row_from(none, 3) == 0;
  for (int64_t k = 0; k < 4; ++k) {
    const int64_t row = places[static_cast<size_t>(k)];
    found = found && first_row_from(rows, row) == k && first_row_from(rows, row + 1) == k + 1;
  }
  report(found, "first_row_from finds rows beyond 2^31");
}

}  // namespace

int main() {
  check_places();
  check_bad();
  check_orders();
  return failures == 0 ? 0 : 1;
}
