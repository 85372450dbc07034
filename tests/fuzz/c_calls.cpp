// SPDX-License-Identifier: Apache-2.0
// Random calls of fastadam.h: an error with a message and nothing written, or success and nothing written elsewhere.
//
//   c++ -std=c++17 -O1 tests/fuzz/c_calls.cpp $(python -m fastadam --include) $(python -m fastadam --libs) -o c_calls
//   ./c_calls 1 100000
//
// The arguments are the seed, the number of cases and the number of the first case. Every case is decoded from random
// bytes: small tensors with some invalid fields (null, misaligned or shared pointers; negative or overflowing sizes;
// unknown dtypes; NaN). A C library cannot check whether an address has memory behind it, or how much, so no case does
// that. Arrays are exactly as long as the header requires and lie between guard bytes; under AddressSanitizer each is
// an allocation of its own. The last line counts accepted and refused calls; the exit status is 1 after a finding.
//
// libFuzzer runs the same cases and chooses the bytes by the coverage of the library, which is compiled in:
//
//   clang++ -std=c++17 -O1 -g -fsanitize=fuzzer,address -DFASTADAM_LIBFUZZER ... : see tests/fuzz/libfuzzer.sh
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "fastadam.h"

namespace {

constexpr size_t kGuard = 64;
constexpr uint8_t kFill = 0xA5;

// Random bytes as choices; zeros when they are used up.
class Choices {
 public:
  Choices(const uint8_t* data, size_t size) : data_(data), left_(size) {}

  uint32_t below(uint32_t count) {
    uint32_t number = 0;
    for (int i = 0; i < (count > 256 ? 2 : 1); ++i) {
      number = number * 256 + (left_ > 0 ? *data_ : 0);
      if (left_ > 0) ++data_, --left_;
    }
    return number % count;
  }
  bool one_in(uint32_t count) { return below(count) == count - 1; }  // never when the bytes are used up
  template <class T, size_t n>
  T of(const T (&values)[n]) {
    return values[below(n)];
  }

 private:
  const uint8_t* data_;
  size_t left_;
};

// A block of memory between guards.
struct Block {
  std::vector<uint8_t> bytes;
  std::vector<uint8_t> before;
  size_t size;
  bool is_telemetry = false;

  explicit Block(size_t count) : bytes(count + 2 * kGuard, kFill), size(count) { std::memset(data(), 0, count); }
  // From the allocator, so aligned to 16 bytes; the guard is a multiple of that.
  uint8_t* data() { return bytes.data() + kGuard; }
};

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "finding: %s\n", what.c_str());
  std::abort();
}

constexpr int64_t kOddSizes[] = {-1,
                                 std::numeric_limits<int64_t>::min(),
                                 std::numeric_limits<int64_t>::max(),
                                 (int64_t{1} << 59) + 1,
                                 int64_t{1} << 60,
                                 int64_t{1} << 62,
                                 (int64_t{1} << 62) + 1};
constexpr double kOddNumbers[] = {0, -1, 1, 2, 1e-46, 5e-324, 1e39, 1e308, HUGE_VAL, -HUGE_VAL, NAN};

int64_t item_size(int32_t dtype) { return dtype == 0 || dtype == 1 ? 2 : dtype == 2 ? 4 : 8; }

class Case {
 public:
  explicit Case(Choices choices) : c_(choices) {}

  // Whether the call was accepted.
  bool run() {
    const uint32_t kind = c_.below(16);
    if (kind == 15) return set_up();
    if (kind == 14) return sort(nullptr);
    make_list();
    const fastadam_list* list = c_.one_in(60) ? nullptr : &list_;
    if (kind < 8) {
      const fastadam_hyper hyper = make_hyper();
      const bool is_lazy = c_.below(2) != 0;
      const fastadam_hyper* given = c_.one_in(60) ? nullptr : &hyper;
      return judge([&] { return fastadam_step(list, given, is_lazy); });
    }
    if (kind < 11) {
      const bool restart = c_.below(2) != 0;
      return judge([&] { return fastadam_accumulate(list, restart, c_.below(2) != 0); });
    }
    if (kind == 11) {
      std::vector<void*> sums;
      for (const fastadam_tensor& tensor : tensors_) {
        const bool has_rows = tensor.rows != nullptr && tensor.rows->count >= 0 && tensor.rows->width >= 0;
        const int64_t count = has_rows ? tensor.rows->count * tensor.rows->width : 0;
        sums.push_back(c_.one_in(3) ? nullptr : memory(count * (tensor.grad_dtype == FASTADAM_FLOAT64 ? 8 : 4)));
        if (c_.one_in(20) && tensor.grad_size >= count) sums.back() = const_cast<void*>(tensor.grad);
      }
      return judge([&] { return fastadam_sum_rows(list, sums.data()); });
    }
    void* out = memory(8 * std::max<int64_t>(1, static_cast<int64_t>(tensors_.size())));
    if (kind == 12) return judge([&] { return fastadam_sum_squares(list, static_cast<double*>(out)); });
    return judge([&] { return fastadam_norm(list, static_cast<double*>(out)); });
  }

 private:
  void* memory(int64_t bytes) {
    const bool is_odd = bytes < 0 || bytes > (int64_t{1} << 20);  // a size that will be refused
    blocks_.emplace_back(new Block(is_odd ? 64 : static_cast<size_t>(bytes)));
    return blocks_.back()->data();
  }

  // An array of a tensor: as it should be, or with a fault that every call that uses it must notice.
  template <class T>
  void give(T*& pointer, int64_t bytes, std::vector<Block*>& others) {
    pointer = static_cast<T*>(memory(bytes));
    Block* own = blocks_.back().get();
    if (c_.one_in(80) && !others.empty()) {  // another array of the tensor, if that is as long
      Block* other = others[c_.below(static_cast<uint32_t>(others.size()))];
      if (other->size >= own->size) pointer = static_cast<T*>(static_cast<void*>(other->data()));
    }
    others.push_back(own);
    if (c_.one_in(50)) pointer = nullptr;
  }

  void fill(const void* array, int64_t bytes, int32_t dtype) {
    if (array == nullptr || bytes < 0 || bytes > (int64_t{1} << 20)) return;
    auto* data = static_cast<uint8_t*>(const_cast<void*>(array));
    const bool is_odd = c_.one_in(12);
    for (int64_t i = 0; i < bytes; ++i) {  // the high bytes of numbers near 1, or anything
      const int64_t place = i % item_size(dtype), last = item_size(dtype) - 1;
      data[i] = is_odd ? static_cast<uint8_t>(c_.below(256)) : place == last ? 0x3C : static_cast<uint8_t>(i * 37);
    }
  }

  int32_t dtype() { return c_.one_in(40) ? c_.of({-1, 4, 1 << 30}) : static_cast<int32_t>(c_.below(4)); }

  void make_list() {
    static const uint32_t counts[] = {1, 1, 2, 3, 0};
    const uint32_t count = c_.of(counts);
    rows_.reserve(count);
    for (uint32_t i = 0; i < count; ++i) tensors_.push_back(make_tensor());
    list_ = {FASTADAM_ABI,
             tensors_.empty() && c_.below(2) ? nullptr : tensors_.data(),
             static_cast<int64_t>(count),
             nullptr,
             nullptr,
             0};
    if (c_.one_in(40)) list_.abi = c_.of({0, 2, -1, 1 << 30});
    if (c_.one_in(60)) list_.count = -static_cast<int64_t>(c_.below(3));
    if (c_.one_in(60)) list_.tensors = nullptr;
    if (c_.one_in(3)) group();
  }

  void group() {  // arrays that are long enough for every count that the library may read
    const int64_t count = static_cast<int64_t>(tensors_.size());
    heads_.assign(tensors_.size() + 2, 0);
    offsets_.assign(tensors_.size() + 2, 0);
    for (int64_t i = 0; i < count; ++i) {
      const size_t at = static_cast<size_t>(i);
      heads_[at] = c_.one_in(30) ? static_cast<int64_t>(c_.below(5)) - 1 : i;
      offsets_[at + 1] = offsets_[at] + (tensors_[at].size < 1000 && tensors_[at].size >= 0 ? tensors_[at].size : 0);
    }
    list_.heads = c_.one_in(30) ? nullptr : heads_.data();
    list_.offsets = c_.one_in(30) ? nullptr : offsets_.data();
    list_.variable_count = c_.one_in(30) ? c_.of(kOddSizes) : count;
    if (count > 1 && c_.one_in(4)) {  // two gradients of one variable
      tensors_[0].next = 1;
      tensors_[1].var = tensors_[0].var;
      tensors_[1].m = tensors_[0].m;
      tensors_[1].v = tensors_[0].v;
      tensors_[1].vhat = tensors_[0].vhat;
      tensors_[1].average = tensors_[0].average;
      tensors_[1].accumulator = tensors_[0].accumulator;
      tensors_[1].dtype = tensors_[0].dtype;
      tensors_[1].moments = tensors_[0].moments;
      tensors_[1].m_scales = tensors_[1].v_scales = nullptr;
      tensors_[1].low = nullptr;
      tensors_[1].size = tensors_[0].size;
      list_.variable_count = count - 1;
      for (size_t k = 1; k + 1 < heads_.size(); ++k) heads_[k] = heads_[k + 1];
      for (size_t k = 1; k + 1 < offsets_.size(); ++k) offsets_[k] = offsets_[k + 1];
    }
    for (int64_t& offset : offsets_) {
      if (c_.one_in(60)) offset += static_cast<int64_t>(c_.below(5)) - 2;
    }
  }

  fastadam_tensor make_tensor() {
    const int64_t width = 1 + static_cast<int64_t>(c_.below(5)), count = static_cast<int64_t>(c_.below(40));
    const int64_t size = c_.one_in(40) ? c_.of(kOddSizes) : count * width;
    fastadam_tensor t = fastadam_dense(nullptr, nullptr, nullptr, nullptr, size, FASTADAM_FLOAT32);
    t.dtype = static_cast<fastadam_dtype>(dtype());
    t.grad_dtype = c_.one_in(6) ? static_cast<fastadam_dtype>(dtype()) : t.dtype;
    t.copy_dtype = static_cast<fastadam_dtype>(dtype());
    t.moments = static_cast<fastadam_moments>(c_.one_in(8) ? static_cast<int32_t>(c_.below(6)) - 1 : 0);
    const int64_t wide = t.dtype == FASTADAM_FLOAT64 ? 8 : 4;
    const int64_t slot = t.moments == FASTADAM_MOMENTS_8BIT ? 1
                         : t.moments == FASTADAM_MOMENTS_HALF || t.moments == FASTADAM_MOMENTS_BFLOAT16
                             ? 2
                             : std::max<int64_t>(wide, 4);
    const auto bytes = [size](int64_t item) { return size < 0 || size > (1 << 20) ? -1 : size * item; };
    std::vector<Block*> own;
    give(t.var, bytes(item_size(t.dtype)), own);
    give(t.m, bytes(slot), own);
    give(t.v, bytes(slot), own);
    fill(t.var, bytes(item_size(t.dtype)), t.dtype);
    if (has_vhat_ == 2) has_vhat_ = c_.one_in(4);
    if ((has_vhat_ != 0) != c_.one_in(40)) give(t.vhat, bytes(slot), own);
    if (c_.one_in(4)) give(t.average, bytes(wide), own);
    if (c_.one_in(6)) give(t.copy, bytes(item_size(t.copy_dtype)), own);
    if (!c_.one_in(6)) give(t.accumulator, bytes(wide), own);
    if (t.moments == FASTADAM_MOMENTS_8BIT || c_.one_in(40)) {
      give(t.m_scales, size < 0 || size > (1 << 20) ? -1 : (size + 127) / 128, own);
      give(t.v_scales, size < 0 || size > (1 << 20) ? -1 : (size + 127) / 128, own);
    }
    if (t.dtype == FASTADAM_BFLOAT16 && c_.one_in(4)) give(t.low, bytes(2), own);
    if (c_.one_in(6)) {
      t.telemetry = static_cast<fastadam_telemetry*>(memory(sizeof(fastadam_telemetry)));
      blocks_.back()->is_telemetry = true;
    }
    if (c_.one_in(3)) {
      make_rows(t, count, width);
    } else if (c_.one_in(40)) {
      t.grad_size = c_.of(kOddSizes);
    }
    const int64_t values = t.grad_size < 0 || t.grad_size > (1 << 20) ? -1 : t.grad_size * item_size(t.grad_dtype);
    give(t.grad, values, own);
    fill(t.grad, values, t.grad_dtype);
    misalign(t.var), misalign(t.average), misalign(t.copy), misalign(t.accumulator);
    if (slot > 1) misalign(t.m), misalign(t.v);
    if (c_.one_in(40)) t.next = c_.of({0, 1, 5, -2, 1 << 30});
    if (c_.one_in(12)) t.grad_factor = c_.of(kOddNumbers);
    if (c_.one_in(60)) t.stale = reinterpret_cast<const fastadam_stale_rows*>(memory(64));
    t.decays = c_.below(2) != 0;
    t.stochastic = c_.one_in(8);
    t.parameter = c_.below(256);
    return t;
  }

  // By one byte, which no array of numbers of several bytes may be.
  template <class T>
  void misalign(T*& pointer) {
    if (pointer != nullptr && c_.one_in(100)) pointer = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(pointer) - 1);
  }

  void make_rows(fastadam_tensor& t, int64_t table_rows, int64_t width) {
    constexpr size_t kMost = 16;
    const int64_t count = table_rows == 0 ? 0 : static_cast<int64_t>(c_.below(8));
    std::vector<int64_t> indices;
    for (int64_t i = 0; i < count; ++i)
      indices.push_back(static_cast<int64_t>(c_.below(static_cast<uint32_t>(table_rows))));
    const int64_t needed = fastadam_sort_memory(count);
    auto* sorted = static_cast<int64_t*>(memory(needed * 8));
    rows_.emplace_back();
    fastadam_rows& rows = rows_.back();
    const fastadam_status status =
        fastadam_sort_rows(indices.data(), true, count, table_rows, width, sorted, &rows, nullptr);
    if (status != FASTADAM_OK) ::fail(std::string("good indices are refused: ") + fastadam_error());
    // In arrays that a wrong count may be read from.
    auto* copied = static_cast<int64_t*>(memory(3 * kMost * 8));
    for (size_t k = 0; k < kMost; ++k) {
      const auto place = static_cast<int64_t>(k);
      copied[k] = place < rows.count ? rows.rows[k] : 0;
      copied[kMost + k] = place <= rows.count && rows.count > 0 ? rows.starts[k] : 0;
      copied[2 * kMost + k] = place < count ? rows.order[k] : 0;
    }
    rows.rows = copied, rows.starts = copied + kMost, rows.order = copied + 2 * kMost;
    t.grad_size = count * width;
    t.rows = &rows;
    if (!c_.one_in(4)) return;
    const int64_t odd[] = {-1, 0, 1, 2, 40, int64_t{1} << 61, int64_t{1} << 62, std::numeric_limits<int64_t>::min()};
    switch (c_.below(8)) {
      case 0:
        rows.count = c_.of({int64_t{-1}, int64_t{0}, int64_t{7}, std::numeric_limits<int64_t>::min()});
        break;
      case 1:
        rows.width = c_.of(odd);
        break;
      case 2:
        copied[c_.below(8)] = c_.of(odd);
        break;
      case 3:
        copied[kMost + c_.below(8)] = c_.of(odd);
        break;
      case 4:
        copied[2 * kMost + c_.below(8)] = c_.of(odd);
        break;
      case 5:
        t.grad_size = c_.of({int64_t{-1}, int64_t{0}, int64_t{1}, int64_t{1} << 60});
        break;
      case 6:
        rows.rows = nullptr;
        break;
      default:
        rows.starts = nullptr;
    }
    if (t.grad_size == 1) t.grad_size = std::min<int64_t>(1, count * width);
  }

  fastadam_hyper make_hyper() {
    fastadam_hyper h = fastadam_defaults(1 + static_cast<int64_t>(c_.below(300)));
    double* const numbers[] = {&h.learning_rate,  &h.beta_1,       &h.beta_2,       &h.epsilon,
                               &h.decay,          &h.clip_value,   &h.clip_norm,    &h.global_clip_norm,
                               &h.gradient_scale, &h.weight_decay, &h.ema_momentum, &h.l2};
    if (c_.one_in(4)) *c_.of(numbers) = c_.of(kOddNumbers);
    if (c_.one_in(4)) *c_.of(numbers) = 0.5;
    if (c_.one_in(30)) h.step = c_.of(kOddSizes);
    h.ema_overwrite = c_.one_in(6);
    h.require_finite = c_.one_in(3);
    h.epsilon_corrected = c_.one_in(4);
    h.zero_gradients = c_.one_in(8);
    h.seed = c_.below(1000);
    return h;
  }

  // What needs no list.
  bool set_up() {
    const int32_t odd[] = {-1,
                           1,
                           2,
                           0,
                           FASTADAM_MOST_THREADS + 1,
                           std::numeric_limits<int32_t>::max(),
                           std::numeric_limits<int32_t>::min()};
    const char* const names[] = {nullptr, "", "avx9", "baseline", "\xff", "baseline\n"};
    fastadam_isa(c_.of(odd));
    (void)fastadam_isa_is_usable(c_.of(odd));
    for (const int64_t count : kOddSizes) {
      if (fastadam_sort_memory(count) != -1) ::fail("fastadam_sort_memory accepts a count that nothing can have");
    }
    if (c_.below(2) != 0) return judge([&] { return fastadam_set_isa(c_.of(names)); });
    return judge([&] { return fastadam_set_num_threads(c_.of(odd)); });
  }

  bool sort(int64_t* bad) {
    const bool is_int64 = c_.below(2) != 0;
    const int64_t count = c_.one_in(8) ? c_.of(kOddSizes) : static_cast<int64_t>(c_.below(40));
    const int64_t rows = c_.one_in(8) ? c_.of(kOddSizes) : static_cast<int64_t>(c_.below(40));
    const int64_t width = c_.one_in(8) ? c_.of(kOddSizes) : static_cast<int64_t>(c_.below(6));
    const int64_t used = count < 0 || count > 100 ? 0 : count;
    void* indices = memory(used * (is_int64 ? 8 : 4));
    for (int64_t i = 0; i < used; ++i) {
      const int64_t index = c_.one_in(60) ? c_.of(kOddSizes) : static_cast<int64_t>(c_.below(40));
      if (is_int64) std::memcpy(static_cast<int64_t*>(indices) + i, &index, 8);
      const auto narrow = static_cast<int32_t>(index);
      if (!is_int64) std::memcpy(static_cast<int32_t*>(indices) + i, &narrow, 4);
    }
    scratch_ = static_cast<int64_t*>(memory(std::max<int64_t>(fastadam_sort_memory(used), 1) * 8));
    int64_t* const scratch = c_.one_in(30) ? nullptr : scratch_;
    fastadam_rows sorted{};
    fastadam_rows* const out = c_.one_in(30) ? nullptr : &sorted;
    if (c_.one_in(30)) misalign_by_one(indices);
    return judge([&] { return fastadam_sort_rows(indices, is_int64, count, rows, width, scratch, out, bad); });
  }

  static void misalign_by_one(void*& pointer) { pointer = static_cast<uint8_t*>(pointer) - 1; }

  template <class Call>
  bool judge(Call call) {
    for (auto& block : blocks_) block->before = block->bytes;
    const fastadam_status status = call();
    for (auto& block : blocks_) {
      const bool is_scratch = reinterpret_cast<uint8_t*>(scratch_) == block->data();
      const bool is_measured = status == FASTADAM_NOT_FINITE && block->is_telemetry;
      if (status != FASTADAM_OK && !is_scratch && !is_measured && block->bytes != block->before) {
        ::fail(std::string("a refused call wrote: ") + fastadam_error());
      }
      for (size_t i = 0; i < kGuard; ++i) {
        if (block->bytes[i] != kFill || block->bytes[kGuard + block->size + i] != kFill) ::fail("a guard was written");
      }
    }
    if (status == FASTADAM_OK || status == FASTADAM_NOT_FINITE) return status == FASTADAM_OK;
    if (status != FASTADAM_INVALID && status != FASTADAM_NO_MEMORY)
      ::fail("an unknown status " + std::to_string(status));
    const std::string text = fastadam_error();
    const bool is_plain = text.find(": ") != std::string::npos || status == FASTADAM_NO_MEMORY;
    if (!is_plain || text.find("fastadam::") != std::string::npos) ::fail("the message names no argument: " + text);
    return false;
  }

  Choices c_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<fastadam_tensor> tensors_;
  std::vector<fastadam_rows> rows_;
  std::vector<int64_t> heads_, offsets_;
  fastadam_list list_{};
  int64_t* scratch_ = nullptr;
  int has_vhat_ = 2;  // 2: not decided
};

}  // namespace

#if defined(FASTADAM_LIBFUZZER)

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Case(Choices(data, size)).run();
  return 0;
}

#else

namespace {

long long seed = 1, current = 0;

void tell_case(int) {
  char text[96];
  const int size = std::snprintf(text, sizeof(text), "case %lld of seed %lld\n", current, seed);
  if (write(2, text, static_cast<size_t>(size)) < 0) std::_Exit(3);
  std::_Exit(1);
}

uint64_t mixed(uint64_t x) {  // splitmix64
  x += 0x9E3779B97F4A7C15;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

}  // namespace

int main(int count, char** given) {
  const auto argument = [&](int at, long long usual) { return count > at ? std::atoll(given[at]) : usual; };
  seed = argument(1, 1);
  const long long cases = argument(2, 100000), first = argument(3, 0);
  for (const int number : {SIGSEGV, SIGBUS, SIGFPE, SIGABRT, SIGILL}) std::signal(number, tell_case);
  long long accepted = 0;
  for (current = first; current < first + cases; ++current) {
    uint64_t bytes[256];
    for (uint64_t i = 0; i < 256; ++i)
      bytes[i] = mixed(mixed(static_cast<uint64_t>(seed)) + 256 * static_cast<uint64_t>(current) + i);
    accepted += Case(Choices(reinterpret_cast<const uint8_t*>(bytes), sizeof(bytes))).run();
  }
  std::printf("c_calls: seed %lld, cases %lld to %lld: %lld accepted, %lld refused, 0 findings\n", seed, first,
              first + cases - 1, accepted, cases - accepted);
  return 0;
}

#endif
