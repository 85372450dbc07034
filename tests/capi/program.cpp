// SPDX-License-Identifier: Apache-2.0
// For tests/test_c_interface.py: uses the C interface from C++, with types and options that program.c does not cover.
#include <fastadam.h>

#include <cstdio>
#include <limits>
#include <string>
#include <vector>

namespace {

fastadam_list list_of(const std::vector<fastadam_tensor>& tensors) {
  return {FASTADAM_ABI, tensors.data(), static_cast<int64_t>(tensors.size()), nullptr, nullptr, 0};
}

// A float64 variable with PyTorch's options, an average and an accumulator.
void step_and_accumulate() {
  std::vector<double> w(5, 1.0), g(5, 0.5), m(5), v(5);
  std::vector<fastadam_tensor> tensors = {fastadam_dense(w.data(), g.data(), m.data(), v.data(), 5, FASTADAM_FLOAT64)};
  std::vector<double> average(5, 1.0), accumulator(5, 7.0);
  tensors[0].average = average.data();
  tensors[0].accumulator = accumulator.data();
  const fastadam_list list = list_of(tensors);
  fastadam_hyper hyper = fastadam_defaults(1);
  hyper.l2 = 0.25;
  hyper.epsilon_corrected = true;
  hyper.ema_momentum = 0.5;
  if (fastadam_accumulate(&list, true, false) != FASTADAM_OK) std::printf("error %s\n", fastadam_error());
  if (fastadam_accumulate(&list, false, false) != FASTADAM_OK) std::printf("error %s\n", fastadam_error());
  if (fastadam_step(&list, &hyper, false) != FASTADAM_OK) std::printf("error %s\n", fastadam_error());
  std::printf("double %a average %a accumulator %a\n", w[0], average[0], accumulator[0]);
}

// Invalid rows of a table with 4 rows, and heads that do not match the tensors.
void refuse_rows(const fastadam_tensor& dense) {
  const fastadam_hyper hyper = fastadam_defaults(1);
  const auto refused = [&](const fastadam_list& list) {
    const fastadam_status status = fastadam_step(&list, &hyper, false);
    std::printf("status %d %s\n", static_cast<int>(status), fastadam_error());
  };
  using Indices = std::vector<int64_t>;
  const auto try_rows = [&](const Indices& list, const Indices& starts, const Indices& order) {
    const fastadam_rows rows = {list.empty() ? nullptr : list.data(), starts.data(), order.data(), 2, 1};
    fastadam_tensor tensor = dense;
    tensor.rows = &rows;
    tensor.grad_size = 2;
    refused({FASTADAM_ABI, &tensor, 1, nullptr, nullptr, 0});
  };
  try_rows({}, {0, 1, 2}, {0, 1});
  try_rows({2, 0}, {0, 1, 2}, {0, 1});
  try_rows({0, 2}, {0, 0, 2}, {0, 1});
  try_rows({0, 2}, {-1, 1, 2}, {0, 1});
  try_rows({0, 2}, {0, 1, 2}, {0, 1000000000});
  try_rows({0, 4}, {0, 1, 2}, {0, 1});
  const fastadam_tensor two[] = {dense, dense};
  const int64_t heads[] = {0, 0}, offsets[] = {0, 4, 8};
  refused({FASTADAM_ABI, two, 2, heads, offsets, 2});
  refused({FASTADAM_ABI, two, 2, heads, offsets, 1});

  const std::vector<int64_t> row_list = {0, 2}, starts = {0, 1, 2};
  const fastadam_rows rows[] = {{row_list.data(), starts.data(), row_list.data(), 1, 1},
                                {row_list.data(), starts.data(), starts.data(), 2, 1}};
  fastadam_tensor chained[] = {dense, dense};
  for (int i = 0; i < 2; ++i) {
    chained[i].rows = &rows[i];
    chained[i].grad_size = i + 1;
  }
  chained[0].next = 1;
  const int64_t lengths[] = {0, 1};
  for (const int64_t* begins : {heads, static_cast<const int64_t*>(nullptr)}) {
    const fastadam_list list = {FASTADAM_ABI, chained, 2, begins, lengths, 1};
    const fastadam_status status = fastadam_step(&list, &hyper, true);
    std::printf("status %d %s\n", static_cast<int>(status), fastadam_error());
  }
}

// Calls that are refused change nothing: the variable stays 1.
void refusals() {
  std::vector<float> w(4, 1.0F), g(4, 0.5F), m(4), v(4);
  const fastadam_tensor good = fastadam_dense(w.data(), g.data(), m.data(), v.data(), 4, FASTADAM_FLOAT32);
  const auto refused = [&](fastadam_tensor tensor, fastadam_hyper hyper, int32_t abi = FASTADAM_ABI) {
    const std::vector<fastadam_tensor> tensors = {good, tensor};
    fastadam_list list = list_of(tensors);
    list.abi = abi;
    const fastadam_status status = fastadam_step(&list, &hyper, false);
    std::printf("status %d %s\n", static_cast<int>(status), w == std::vector<float>(4, 1.0F) ? fastadam_error() : "?");
  };
  const fastadam_hyper usual = fastadam_defaults(1);
  fastadam_tensor bad = good;
  bad.m = nullptr;
  refused(bad, usual);
  bad = good;
  bad.grad_dtype = FASTADAM_FLOAT64;
  refused(bad, usual);
  bad = good;
  bad.var = reinterpret_cast<char*>(w.data()) + 1;
  refused(bad, usual);
  bad = good;
  bad.vhat = v.data();
  refused(bad, usual);
  bad = good;
  bad.next = 0;
  refused(bad, usual);
  fastadam_hyper hyper = usual;
  hyper.beta_2 = 1 - 1e-10;
  refused(good, hyper);
  hyper = usual;
  hyper.step = 0;
  refused(good, hyper);
  hyper = usual;
  hyper.require_finite = true;
  g[3] = std::numeric_limits<float>::infinity();
  refused(good, hyper);
  refused(good, usual, FASTADAM_ABI + 1);
  g[3] = 0.5F;
  bad = good;
  bad.grad_factor = std::numeric_limits<double>::quiet_NaN();
  refused(bad, usual);
  bad.grad_factor = 1e39;
  refused(bad, usual);
  bad = good;
  bad.size = bad.grad_size = std::numeric_limits<int64_t>::max();
  refused(bad, usual);
  bad = good;
  bad.stale = reinterpret_cast<const fastadam_stale_rows*>(w.data());
  refused(bad, usual);
  hyper = usual;
  hyper.ema_momentum = 2;
  refused(good, hyper);
  hyper = usual;
  hyper.gradient_scale = std::numeric_limits<double>::infinity();
  refused(good, hyper);
  hyper = usual;
  hyper.l2 = -1;
  refused(good, hyper);
  const fastadam_rows no_rows{nullptr, nullptr, nullptr, 0, int64_t{1} << 40};
  refused(fastadam_sparse(w.data(), g.data(), int64_t{1} << 24, &no_rows, m.data(), v.data(), 4, FASTADAM_FLOAT32),
          usual);
  refuse_rows(good);
  const int64_t index = 4;
  std::vector<int64_t> memory(static_cast<size_t>(fastadam_sort_memory(1)));
  fastadam_rows rows{};
  int64_t place = -1;
  const fastadam_status status = fastadam_sort_rows(&index, true, 1, 4, 1, memory.data(), &rows, &place);
  std::printf("status %d %s\n", static_cast<int>(status), fastadam_error());
}

}  // namespace

int main() {
  step_and_accumulate();
  refusals();
  return 0;
}
