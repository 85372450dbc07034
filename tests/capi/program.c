/* SPDX-License-Identifier: Apache-2.0
 * For tests/test_c_interface.py: uses the C interface from C99, and prints the results in hexadecimal. */
#include <fastadam.h>
#include <stdio.h>
#include <stdlib.h>

enum { kRows = 6, kWidth = 3, kSize = kRows * kWidth, kSteps = 3, kIndices = 4 };

static void fill(float* values, int size, float step, float from) {
  for (int i = 0; i < size; ++i) values[i] = from + step * (float)i;
}

static void show(const char* name, const float* values, int size) {
  printf("%s", name);
  for (int i = 0; i < size; ++i) printf(" %a", (double)values[i]);
  printf("\n");
}

static void require(fastadam_status status) {
  if (status == FASTADAM_OK) return;
  printf("error %s\n", fastadam_error());
  exit(1);
}

/* Two dense variables with a clipped global norm and AdamW's decay, from which the second is excluded. */
static void dense_list(void) {
  float w[2][kSize], g[2][kSize], m[2][kSize] = {{0}}, v[2][kSize] = {{0}};
  fastadam_tensor tensors[2];
  fastadam_list list = {FASTADAM_ABI, tensors, 2, NULL, NULL, 0};
  for (int k = 0; k < 2; ++k) {
    fill(w[k], kSize, 0.25F, -1.0F);
    fill(g[k], kSize, 0.125F, -0.5F * (float)(k + 1));
    tensors[k] = fastadam_dense(w[k], g[k], m[k], v[k], kSize, FASTADAM_FLOAT32);
  }
  tensors[1].decays = false;
  for (int64_t step = 1; step <= kSteps; ++step) {
    fastadam_hyper hyper = fastadam_defaults(step);
    hyper.learning_rate = 0.01;
    hyper.weight_decay = 0.1;
    hyper.global_clip_norm = 1;
    require(fastadam_step(&list, &hyper, false));
  }
  show("dense", w[0], kSize);
  show("second", w[1], kSize);
}

/* AMSGrad for a table whose gradient names one row twice. Updates every row or only the named ones. */
static void sparse(const char* name, bool lazy) {
  const int32_t indices[kIndices] = {4, 1, 4, 0};
  float table[kSize], values[kIndices * kWidth], m[kSize] = {0}, v[kSize] = {0}, vhat[kSize] = {0};
  int64_t* memory = malloc(sizeof(int64_t) * (size_t)fastadam_sort_memory(kIndices));
  fastadam_rows rows;
  fastadam_tensor tensor;
  fastadam_list list = {FASTADAM_ABI, &tensor, 1, NULL, NULL, 0};
  fill(table, kSize, 0.25F, -1.0F);
  fill(values, kIndices * kWidth, 0.125F, -0.5F);
  require(fastadam_sort_rows(indices, false, kIndices, kRows, kWidth, memory, &rows, NULL));
  tensor = fastadam_sparse(table, values, kIndices, &rows, m, v, kSize, FASTADAM_FLOAT32);
  tensor.vhat = vhat;
  for (int64_t step = 1; step <= kSteps; ++step) {
    const fastadam_hyper hyper = fastadam_defaults(step);
    require(fastadam_step(&list, &hyper, lazy));
  }
  show(name, table, kSize);
  free(memory);
}

static void norms(void) {
  float g[kSize];
  double sum = 0;
  fastadam_tensor tensor;
  const fastadam_list list = {FASTADAM_ABI, &tensor, 1, NULL, NULL, 0};
  fill(g, kSize, 0.125F, -0.5F);
  tensor = fastadam_dense(NULL, g, NULL, NULL, kSize, FASTADAM_FLOAT32);
  require(fastadam_sum_squares(&list, &sum));
  printf("norm %a\n", sum);
}

int main(void) {
  if (fastadam_abi() != FASTADAM_ABI) return 2;
  dense_list();
  sparse("every", false);
  sparse("lazy", true);
  norms();
  printf("version %s\n", fastadam_version());
  return 0;
}
